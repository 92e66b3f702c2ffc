"""Load, validate and tokenize data. Stages: `sources`, `formats`, `encoding`, `gate`, `prepare`.

This package must not import `methods`, `weights` or `tasks`; the task is passed as an argument.
"""
