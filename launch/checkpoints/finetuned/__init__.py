"""Checkpoints of runs that train a part of their weights: the frozen rest, merged weights, adapter files."""
