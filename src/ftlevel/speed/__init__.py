"""Faster forms of the training step, each equal to the plain one within the dtype's rounding."""
