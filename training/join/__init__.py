"""What was served and what came of it, from Redis streams to labelled parquet."""
