"""Header checks by image format, before decoding."""
