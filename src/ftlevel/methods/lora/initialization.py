"""LoftQ (Li et al., 2023): LoRA begins as the best low-rank fit of what quantization took away.

Algorithm 1 with one step on a base that is quantized already: s · B · A ≈ W - dequantize(Q), the
truncated SVD of the residual, its singular values shared evenly between A and B. PEFT's own routine
needs CUDA and leaves out the scale s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def start_from_residual(model: Any, weight_of: Callable[[str], torch.Tensor]) -> None:
    """Set A and B of every LoRA on a 4-bit linear of `model` (mutated).

    Afterwards its config says the default start, as whoever loads the adapter has nothing to redo.

    Args:
        model: a `PeftModel` with one LoRA, fresh.
        weight_of: name of a linear in the base → its weight (out, in) before quantization.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora import Linear4bit

    name_of_base = "base_model.model."
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        packed = layer.get_base_layer().weight
        held = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        weight = weight_of(name.removeprefix(name_of_base)).to(held.device, torch.float32)
        residual = (weight - held.float()) / layer.scaling["default"]
        a, b = factor(residual, layer.r["default"])
        for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
            factors["default"].weight.data.copy_(value)
    model.peft_config["default"].init_lora_weights = True


def factor(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) whose product is the best fit of `matrix` (out, in).

    By the eigenvectors of the smaller Gram matrix in float64, which takes a tenth of an SVD's time.
    """
    rows, columns = matrix.shape
    if rows < columns:
        b, a = factor(matrix.T, rank)
        return a.T, b.T
    exact = matrix.double()
    squares, vectors = torch.linalg.eigh(exact.T @ exact)
    top = vectors[:, -rank:].flip(1)
    root = squares[-rank:].flip(0).clamp_min(1e-30).sqrt().sqrt()  # of the singular values
    return (top * root).T.float(), ((exact @ top) / root).float()
