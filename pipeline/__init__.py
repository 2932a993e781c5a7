"""Shards to packed batches: what is in a training step."""
