"""The dashboard, made by a program."""
