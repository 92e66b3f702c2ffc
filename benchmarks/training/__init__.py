"""Workloads, commands of the tools, and the meter of `benchmarks/train.py`."""
