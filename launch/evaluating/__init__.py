"""Evaluations of checkpoints while training goes on."""
