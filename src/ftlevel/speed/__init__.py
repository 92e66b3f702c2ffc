"""The fast step: rows without padding, heads on targets only, fused low-rank updates.

Everything here changes how fast a result comes, never the result. Nothing here knows of the
configuration, of tasks or of data: a batch is a mask of its tokens, a model is its blocks.
"""
