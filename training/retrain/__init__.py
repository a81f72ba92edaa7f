"""From an impression log to a version that is live if it is better: checks, training, gate, report."""
