"""Encode a corpus: cached latents and text features."""
