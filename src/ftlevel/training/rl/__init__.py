"""Reinforcement learning: the Trainer that samples before each step, and the checks of a run.

Must not import `commands`.
"""
