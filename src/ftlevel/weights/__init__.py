"""Checkpoints on disk: weights are read, quantized and written tensor by tensor.

May import `models` and the packages below it. It must not load a whole model into memory.
"""
