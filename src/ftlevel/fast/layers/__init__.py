"""Layers with a forward and backward of their own: LoRA's linear, norms, gated units, dropout.

Each is put in the place of a model's module that computes the same; nothing here knows a task.
"""
