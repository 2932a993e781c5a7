"""Command line, configuration, training and sampling."""
