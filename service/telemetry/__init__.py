"""Metrics, logs and traces."""

FIRST = "first"
"""A file in the folder that workers count in, made with it: where it is gone, so are some of their counts."""
