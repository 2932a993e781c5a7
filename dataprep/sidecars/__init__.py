"""Columns added to a finished corpus."""
