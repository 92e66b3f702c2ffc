"""Reinforcement learning from checkable rewards: rows, rewards, losses and the objective.

Must not import `training` or `commands`.
"""
