"""What a run measures besides its steps: losses by bin, seconds by section, memory, validation."""
