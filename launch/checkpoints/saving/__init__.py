"""Saving in the background: disk space, mirror, and what follows a checkpoint."""
