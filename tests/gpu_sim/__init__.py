"""A card that is not there: where tensors are, what is waited for, launches and memory of a step.

Nothing is computed, so nothing is said of numbers, and no figure is a measurement. `make gpu-sim`
prints the table.
"""
