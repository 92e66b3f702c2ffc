"""The fast step: packed rows, chunked cross-entropy, pruning, fused layers, shared prefixes.

May import data and what is below it. Everything here changes how fast a result comes, never the
result; a task comes in as an argument.
"""
