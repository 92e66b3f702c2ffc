"""Rewards of `--task rl` that a worker process computes.

Imports nothing of ftlevel, so that the process starts at once.
"""
