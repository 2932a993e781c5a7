"""Plots of the metrics of runs."""
