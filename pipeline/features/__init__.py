"""Cached latents and text features: their manifest, tensors and writer."""
