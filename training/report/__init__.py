"""The report of a training: what it came to, in numbers, charts and a page."""
