"""What a run will need, before its weights are loaded: memory by part and moment, time, disk.

The real step runs on tensors that have a shape and no numbers. May import the rest of training,
which must not import it; writes nothing.
"""
