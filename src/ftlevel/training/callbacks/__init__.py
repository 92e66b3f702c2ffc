"""What goes with the steps of a run, a callback a file.

May import what training may, except the files that build a Trainer. A callback holds its own state
and nothing of the plan; `training.build_trainer` says which there are, in their order.
"""
