"""What a run needs before it starts: memory, time and price, and whether everything is there."""
