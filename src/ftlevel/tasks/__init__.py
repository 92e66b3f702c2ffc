"""What each task is: its model class, its columns, its prompt and its metrics."""
