"""How good a model is on rows and texts, how sure that is, and how far two models are apart.

May import trained and what is below it. It reads no files and changes no model.
"""
