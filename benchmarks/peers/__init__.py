"""Other servers around the row-wise graph, to measure adrank beside; one a file, each run by its own environment."""
