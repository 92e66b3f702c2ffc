"""Resolve and load trained models: runs, adapters, several adapters on one base, other libraries'.

May import tasks and the packages below it; must not train, and writes only adapters.
"""
