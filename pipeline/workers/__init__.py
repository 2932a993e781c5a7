"""Worker processes that survive a crash: one pool for loading and for preparing."""
