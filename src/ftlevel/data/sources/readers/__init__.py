"""One reader a format: a file to chunks of rows, each with its line, and a cursor to go on from.

A file is read as it is or refused with `path:line`; no value is converted, filled in or guessed.
Each format is one module here and one line in `files`. May import what lies beside this folder but
none of what chooses among sources (splits, stream_sources, hub).
"""
