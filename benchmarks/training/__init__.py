"""What `benchmarks/train.py` runs: workloads, the commands of the tools, and the meter."""
