"""Trainer callbacks of a run.

May import what `training` may, except the modules that build a Trainer. A callback has its own
state and no access to the run; `training.build_trainer` lists them in call order.
"""
