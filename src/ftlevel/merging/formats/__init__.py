"""Export formats for other programs, one module per format; formats must not import each other.

Each export is checked by reading it back where possible.
"""
