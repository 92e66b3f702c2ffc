"""Rerankers: cross-encoders that score a query and a document in one sequence.

Data layouts and metrics are those of `embedding`.
"""
