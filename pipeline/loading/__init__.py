"""Planned packs to batches on a device: worker processes read and decode."""
