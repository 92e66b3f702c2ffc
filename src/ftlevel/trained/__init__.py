"""Find and load what was trained: a run, an adapter, several on one base, here or by plain PEFT.

May import tasks and what is below it. It trains nothing and writes only adapters.
"""
