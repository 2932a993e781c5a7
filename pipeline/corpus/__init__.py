"""A corpus as the pipeline sees it: its index, its tables and sidecars, and tars of other tools."""
