"""The online road: a request becomes a ranking."""
