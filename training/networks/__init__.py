"""CTR networks, one family a file, made of `blocks.py`."""
