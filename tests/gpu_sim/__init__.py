"""Simulated GPU: devices, waits, launches and memory of a step.

Nothing is computed, so values are not checked, and no figure is a measurement. `make gpu-sim`
prints the table.
"""
