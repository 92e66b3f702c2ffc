"""Which parts of the fast step a run uses, and why not the others.

Decides from the configuration and the model's shape; puts nothing onto a model.
"""
