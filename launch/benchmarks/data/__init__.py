"""Benchmarks of reading, preparing and planning corpora."""
