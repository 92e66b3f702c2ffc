"""What a run leaves on disk: the run directory, checkpoints, the adapter and its card."""
