"""Load, convert, encode and check the rows of a run, as a table or a stream, with a cache.

May import all of `data`. Code outside `data` gets the rows here.
"""
