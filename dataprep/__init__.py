"""Data preparation: raw image-text corpora → clean shards."""
