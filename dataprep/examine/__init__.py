"""Pass 1: inputs to rows, each image decoded once."""
