"""Where inputs come from: one reader per layout of raw corpora."""
