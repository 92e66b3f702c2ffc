"""Embedding models: data layouts, pooling, losses and the loss over a whole step."""
