"""The end of the model: chunked cross-entropy on supervised tokens, and the last layer's pruning.

Takes hidden states and targets; which tokens are needed is told by the task's objective.
"""
