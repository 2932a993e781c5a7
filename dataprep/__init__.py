"""A raw image-text corpus to clean shards: what is in the data."""
