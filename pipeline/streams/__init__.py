"""Samples in seeded order, from one corpus or many."""
