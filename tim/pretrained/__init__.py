"""Pretrained weights: locating their files, and the published networks' format."""
