"""The model folder: everything that sampling needs."""
