"""Rows of `scripts/torture.py`; each repeats one kind of stress and judges the results."""
