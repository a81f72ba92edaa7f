"""The versions that are loaded: found in the repository, checked, swapped in, and judged as canaries."""
