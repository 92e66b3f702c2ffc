"""What watches a run while the Trainer goes through it, one concern a file.

May import what training may. A callback holds its own state and nothing of the plan.
"""
