"""Evaluation: scoring on rows and texts, confidence intervals, comparison of two models.

May import `trained` and the packages below it. Models are restored after scoring.
"""
