"""From a query to a ranking: features, scores, order, and why. Knows nothing about HTTP or Redis."""
