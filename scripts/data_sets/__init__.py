"""Recipes for small real data sets, each from packages that anybody can download.

One module a source. A recipe yields rows; ordering and splitting are by SHA-1, never by a random
generator, so that the same releases give the same bytes everywhere.
"""
