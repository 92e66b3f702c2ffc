"""LoRA's linear as one fused autograd function, on float, 4-bit and 8-bit bases.

PEFT computes `base(x) + B(A(dropout(x))) * s` as eight operations with four casts of activations
around them. Here base and update are one function that computes in the base's precision from
float32 A and B. The layers are PEFT's own classes with another `forward`: parameters, state dict,
merging, switching and the saved adapter are PEFT's; where the function does not apply, so is
`forward`.
"""

from ftlevel.fast.layers.fused_lora.layer import register_fused_layers
from ftlevel.fast.layers.fused_lora.unneeded import skip_unneeded_products

__all__ = ["register_fused_layers", "skip_unneeded_products"]
