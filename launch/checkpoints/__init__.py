"""What a run leaves on disk: checkpoints, run folders, exports."""
