"""LoftQ and EVA initialization of LoRA.

    LoftQ:  s · B · A ≈ W − dequantize(Q)      Li et al., 2023, algorithm 1 with one step
    EVA:    A = top directions of the layer's inputs         Paischer et al., 2024

LoftQ uses the truncated SVD of the residual, with singular values split evenly between A and B;
PEFT's routine needs CUDA and omits the scale s. EVA distributes ranks by explained variance.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftlevel.errors import ConfigError
from ftlevel.models.hardware import autocast, eval_mode


@torch.no_grad()
def start_from_residual(model: Any, weight_of: Callable[[str], Tensor]) -> None:
    """Initialize LoRA on the 4-bit layers of `model` (modified) with LoftQ.

    `weight_of` returns the unquantized weight `(out, in)` of a layer by name. The config then gets
    PEFT's default initialization, so that loading the adapter does not repeat LoftQ.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora import Linear4bit

    name_of_base = "base_model.model."
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        packed = layer.get_base_layer().weight
        dequantized = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        weight = weight_of(name.removeprefix(name_of_base)).to(dequantized.device, torch.float32)
        a, b = factor((weight - dequantized.float()) / layer.scaling["default"], layer.r["default"])
        for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
            factors["default"].weight.data.copy_(value)
    model.peft_config["default"].init_lora_weights = True


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A `(rank, in)` and B `(out, rank)` with B @ A nearest to `matrix` `(out, in)`.

    Uses eigenvectors of the smaller Gram matrix in float64, about ten times faster than an SVD.
    """
    rows, columns = matrix.shape
    if rows < columns:
        b, a = factor(matrix.T, rank)
        return a.T, b.T
    matrix64 = matrix.double()
    squares, vectors = torch.linalg.eigh(matrix64.T @ matrix64)
    top = vectors[:, -rank:].flip(1)
    root = squares[-rank:].flip(0).clamp_min(1e-30).sqrt().sqrt()  # root of singular values
    return (top * root).T.float(), ((matrix64 @ top) / root).float()


def start_from_data(model: Any, batches: Any, device: str, dtype: str) -> None:
    """Initialize A, rank and scale of LoRA in `model` (modified) with EVA, from `batches`.

    The config then gets PEFT's default initialization, so that loading does not repeat EVA. Raises
    `ConfigError` if all batches are too small.
    """
    from peft import initialize_lora_eva_weights

    _check_batches(model, batches)
    # PEFT computes the SVD in a hook, and CUDA's autocast would cast its products to 16 bits, for
    # which torch has no QR decomposition. Without autocast, the base runs in its own dtype.
    dtype = dtype if device == "cpu" else "float32"
    # PEFT prints a line for each batch that is too small.
    with eval_mode(model), autocast(device, dtype), contextlib.redirect_stdout(io.StringIO()):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=lambda model, batch: model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ),
            prepare_model_inputs_fn=lambda batch, _: batch["supervised"].nonzero(),
            show_progress_bar=False,
        )
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None


def _check_batches(model: Any, batches: Any) -> None:
    """Raise `ConfigError` if PEFT would wait forever for a batch with enough tokens."""
    from peft.tuners.lora import LoraLayer

    rho = model.peft_config["default"].eva_config.rho
    rank = max(part.r["default"] for part in model.modules() if isinstance(part, LoraLayer))
    needed, largest = round(rank * rho), 0
    for batch in batches:  # the same in all processes
        largest = max(largest, int(batch["supervised"].sum()))
        if largest >= needed:
            return
    raise ConfigError(
        f"--init eva with rank {rank} needs {needed:,} supervised tokens in a batch, and no batch "
        f"has more than {largest:,}. Raise --per-device-train-batch-size, or lower --lora-r."
    )
