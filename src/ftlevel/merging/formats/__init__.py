"""Files for other programs, one module a format, each checked by reading it back where it can be.

May import what merging may; no format knows another.
"""
