"""Attention in a packed row, by what the sequences are: short, blocked, or one flash kernel.

Takes queries, keys, values and a packed layout; nothing here knows a model family.
"""
