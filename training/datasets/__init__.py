"""Public data sets, one a file, and our own prepared form."""
