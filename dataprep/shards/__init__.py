"""Pass 2: rows to shards."""
