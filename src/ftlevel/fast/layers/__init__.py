"""Layers with a custom forward and backward: LoRA layers, norms, GLUs, dropout.

Each replaces a module of the model that computes the same. It must not depend on a task.
"""
