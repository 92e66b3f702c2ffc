"""What `benchmarks/train.py` runs: workloads, commands of the tools, and the meter in their processes."""
