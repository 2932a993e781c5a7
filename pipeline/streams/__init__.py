"""Samples in seeded random order, from one or several corpora."""
