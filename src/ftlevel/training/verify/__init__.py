"""The fast step against the plain one, on the model and the rows of the run.

`steps` computes a step in each way, the fast one by the Trainer itself; `float32` widens the
weights, so that faults are not hidden by rounding; `compare` says how far two gradients are apart;
`proof` decides.
"""
