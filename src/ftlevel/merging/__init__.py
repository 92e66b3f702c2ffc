"""Merge adapters into their base and export them; must not import training or commands."""
