"""Rerankers: cross-encoders that score a query and a document in one sequence.

`rows` encodes queries with their documents, `losses` has the formulas, `objective` applies them and
measures rankings, and `task` defines the task. Data layouts and metrics are those of `embedding`.
"""
