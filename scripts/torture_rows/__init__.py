"""The rows of `scripts/torture.py`: each does something to ftlevel many times, and judges it."""
