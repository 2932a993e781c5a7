"""Which samples share a pack, and which rank runs it."""
