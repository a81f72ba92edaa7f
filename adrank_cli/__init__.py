"""The subcommands of `adrank`. Each loads only what it needs, when it runs."""
