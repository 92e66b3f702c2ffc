"""The fast step: rows without padding, heads on targets only, fused layers, shared prefixes.

May import data and what is below it. Everything here changes how fast a result comes, never the
result; a task comes in as an argument.
"""
