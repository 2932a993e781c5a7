"""The commands of `tim`, by subject."""
