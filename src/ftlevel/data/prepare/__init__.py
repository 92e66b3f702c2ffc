"""One way for a row, from a source to encoded rows, for a table and for a stream, kept in a cache.

May import all of data. Whoever wants rows asks here.
"""
