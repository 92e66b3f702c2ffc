"""Specs of methods that add a matrix to every linear layer, except LoRA and AdaLoRA."""
