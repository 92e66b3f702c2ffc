"""Checkpoints on disk, tensor by tensor: read, copied, quantized and written as a stream.

May import models and what is below it. A whole model is never in memory here.
"""
