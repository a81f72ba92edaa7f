"""All ads in memory, encoded for each model version, and kept up with the store."""
