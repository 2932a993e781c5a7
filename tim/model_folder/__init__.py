"""The model folder: everything needed for sampling."""
