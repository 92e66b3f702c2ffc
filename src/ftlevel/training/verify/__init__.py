"""Verification of the fast step against the plain step, on the model and rows of the run.

`steps` computes a step both ways, the fast one with the Trainer. `bounds` measures the distance of
two gradients, and `proof` decides whether it is acceptable.
"""
