"""`adrank demo`: a synthetic ad world that knows the truth, served, clicked in and learned from."""
