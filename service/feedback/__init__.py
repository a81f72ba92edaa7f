"""What comes back: events that are taken in, and the log of what was served."""
