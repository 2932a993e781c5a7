"""Checkpoints, run folders and exported models."""
