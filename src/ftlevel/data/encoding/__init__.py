"""From examples to token ids and labels, of a length that fits, and to batches.

May import formats and sources. It knows what to compute, not which task asks for it.
"""
