"""Read rows from files, the Hub, built-in datasets and memory, as tables or as streams.

This package imports no other package of `data` and does not interpret columns.
"""
