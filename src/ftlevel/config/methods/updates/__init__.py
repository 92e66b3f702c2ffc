"""Specs of methods that change every linear by a matrix, other than LoRA and AdaLoRA."""
