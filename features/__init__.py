"""The contract: what a feature is and how it becomes a tensor, for training and serving alike."""
