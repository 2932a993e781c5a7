"""What an evaluation says: rows with intervals, verdicts, tables, a plot and a grid."""
