"""Near and exact duplicates, in one corpus and against others."""
