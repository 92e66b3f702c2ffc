"""LoftQ (Li et al., 2023): LoRA begins as the best low-rank fit of what quantization took away.

Algorithm 1 with one step on a base that is quantized already: s · B · A ≈ W - dequantize(Q), the
truncated SVD of the residual, its singular values shared evenly between A and B. PEFT's own routine
needs CUDA and leaves out the scale s.

EVA (Paischer et al., 2024): LoRA's A begins in the directions in which training rows vary most.

One pass over batches of training rows gives each linear's inputs; ranks go where they explain most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ftlevel.models.hardware import autocast


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


def start_from_data(model: Any, batches: Any, device: str, dtype: str) -> None:
    """Set A, ranks and scales of every LoRA of `model` (mutated) from the inputs on `batches`.

    Afterwards its config says the default start, as whoever loads the adapter has nothing to redo.

    Args:
        model: a `PeftModel` with one LoRA, fresh.
        batches: of training rows, as `StartInputs.batches` gives them.
        device: torch device type.
        dtype: compute precision's name.
    """
    from peft import initialize_lora_eva_weights

    training = model.training
    model.eval()
    with autocast(device, dtype):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=_forward,
            prepare_model_inputs_fn=_supervised_positions,
            show_progress_bar=False,
        )
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None
    model.train(training)


def _forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask")})


def _supervised_positions(batch: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
    """Return (n, 2) positions of tokens that are real and, in generation, supervised."""
    return batch["supervised"].nonzero()
