"""`adrank bench`: a load generator for a running service. What else is measured, and how, is in benchmarks/."""
