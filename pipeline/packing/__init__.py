"""Assign samples to packs, and packs to ranks."""
