"""Estimates of memory, time and communication before weights are loaded; writes nothing.

May import the rest of training, which must not import this package.
"""
