"""Tables of inputs: Parquet, Arrow, CSV, TSV, JSON lines."""
