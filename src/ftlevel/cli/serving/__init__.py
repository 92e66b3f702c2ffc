"""The commands that take a model to a server: export and check-served."""
