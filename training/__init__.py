"""The offline road: a log becomes a bundle."""
