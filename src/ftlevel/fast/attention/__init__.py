"""Attention over packed rows: batched short sequences, query blocks, or a flash kernel.

Functions take queries, keys, values and a packed layout. They must not depend on a model family.
"""
