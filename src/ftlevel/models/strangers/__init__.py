"""What others made, and we read or run: bounded in size, in time, and in where it lies."""
