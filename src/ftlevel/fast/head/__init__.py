"""The end of the model: chunked cross-entropy on supervised tokens, and last-layer pruning.

The task's objective defines which tokens are needed.
"""
