"""The one base of the errors that a person can mend."""


class AdrankError(Exception):
    """Its text is a sentence: what is wrong, where, and what to do. The command line prints it in place of a stack trace."""
