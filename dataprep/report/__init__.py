"""What is in a corpus: statistics, charts, the HTML report."""
