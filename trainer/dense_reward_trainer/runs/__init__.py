"""What a run leaves on disk, and the processes that it starts."""
