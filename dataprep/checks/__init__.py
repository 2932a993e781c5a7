"""Verify and repair a corpus."""
