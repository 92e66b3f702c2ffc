"""The fast training step: packing, chunked cross-entropy, pruning, fused layers, shared prefixes.

May import `data` and the packages below it. It must not change results, only speed and memory.
"""
