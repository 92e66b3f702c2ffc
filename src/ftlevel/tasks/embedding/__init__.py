"""Embedding models: data layouts, pooling, losses and the loss over a whole step.

Must not import `evaluation`, `trained` or anything above.
"""
