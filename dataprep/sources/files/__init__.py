"""Paths and URLs, and listing the files under them."""
