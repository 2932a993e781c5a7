"""What a training shows and keeps: start-up, progress line, a log file per rank."""
