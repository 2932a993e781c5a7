"""Weights that others trained: where their files are, and the published networks' format."""
