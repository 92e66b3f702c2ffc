"""Recipes for small real data sets from downloadable packages.

One module per source. A recipe yields rows; rows are ordered and split by SHA-1, never by a random
generator, so the same releases give the same bytes everywhere.
"""
