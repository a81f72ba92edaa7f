"""What another bundle or policy would have earned, estimated from a log that explored."""
