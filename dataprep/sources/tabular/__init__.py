"""Tables of inputs: parquet, arrow, CSV, TSV, JSON lines."""
