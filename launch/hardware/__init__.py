"""What a device can do, and what a run needs of it."""
