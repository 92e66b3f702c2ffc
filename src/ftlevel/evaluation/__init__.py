"""Evaluation: scoring on rows and texts, confidence intervals, comparison of two models.

May import `trained` and the packages below it. A scored model is restored to its former state.
"""
