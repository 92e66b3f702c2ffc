"""From an adapter to a server: what is written for it, what it must answer, and whether it does.

May import what merging may. Formats write by it; it knows none of them.
"""
