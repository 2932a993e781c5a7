"""The report on a corpus: statistics, charts, HTML page."""
