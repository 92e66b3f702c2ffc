"""Estimates of memory, time and communication before weights are loaded; writes nothing.

May import all modules of `training`; these must not import this package.
"""
