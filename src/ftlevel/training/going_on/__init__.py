"""A run that was broken off goes on: from which checkpoint, and only as the same run."""
