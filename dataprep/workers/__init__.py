"""Worker processes and Ray tasks that survive a crash."""
