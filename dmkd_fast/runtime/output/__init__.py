"""What a process prints: progress, and streams that may fail."""
