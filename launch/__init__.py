"""A configuration to a running job: commands, training, sampling."""
