"""The command line: subcommands load what they need when they run."""


def main() -> None:
    """Run `adrank`."""
