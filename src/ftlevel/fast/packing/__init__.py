"""Rows without padding: their layout, the micro-batches they make, and the workers of these.

A batch is a mask of its tokens, a model is its blocks; nothing here knows of configuration or task.
"""
