#!/usr/bin/env python3
"""One LoRA layer, forward and backward: PEFT's beside ours, on every kind of base.

    python benchmarks/fused_lora.py
    python benchmarks/fused_lora.py --tokens 512 --kinds float 4bit --dtype float32

Shapes are those of SmolLM2-135M's blocks. One thread, seconds of CPU, the best of `--rounds`
rounds in which the variants take turns, so that a busy machine meets all of them. `base` is the
frozen linear alone: what a layer costs without an adapter. GFLOP/s count the base's products only
(4 · tokens · in · out): they say how much of the chip the layer leaves to the base.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.layers.fused_lora import register_fused_layers
from ftlevel.models.upstream.quantizers import keep_trainable_layout

SHAPES = {"q, o": (576, 576), "k, v": (576, 192), "gate, up": (576, 1536), "down": (1536, 576)}
KINDS = ("float", "conv1d", "4bit", "8bit")


def build_linear(kind: str, width_in: int, width_out: int, dtype: torch.dtype) -> nn.Module:
    """Return a frozen linear of `kind`, its 4 bits nf4 with double quantization."""
    torch.manual_seed(0)
    if kind == "float":
        return nn.Linear(width_in, width_out, bias=False).to(dtype).requires_grad_(False)
    if kind == "conv1d":
        return Conv1D(width_out, width_in).to(dtype).requires_grad_(False)
    plain = nn.Linear(width_in, width_out, bias=False)
    quantized: nn.Module
    if kind == "4bit":
        quantized = bnb.nn.Linear4bit(
            width_in, width_out, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
    else:
        quantized = bnb.nn.Linear8bitLt(width_in, width_out, bias=False, has_fp16_weights=False)
    quantized.load_state_dict(plain.state_dict())
    keep_trainable_layout(quantized)
    return quantized.to("cpu").requires_grad_(False)


def build_layer(kind: str, shape: tuple[int, int], dtype: torch.dtype, *, fused: bool) -> nn.Module:
    """Return a linear of `kind` with LoRA of rank 8, in training mode."""
    config = peft.LoraConfig(r=8, target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    if fused:
        register_fused_layers(config)
    model: Any = nn.Sequential(build_linear(kind, *shape, dtype))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
    layer: nn.Module = peft.get_peft_model(model, config).train().base_model.model[0]
    return layer


def forward_backward(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Run `layer` as training does, under autocast where it computes in bfloat16."""
    layer.zero_grad()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    y.backward(grad)


def time_variants(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each variant."""
    best = dict.fromkeys(variants, float("inf"))
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.process_time()
            for _ in range(5):
                run()
            best[name] = min(best[name], (time.process_time() - began) / 5)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    print(f"{arguments.tokens} tokens, {arguments.dtype}, torch {torch.__version__}, 1 thread")
    print("| base | linear | base ms | PEFT ms | fused ms | PEFT GFLOP/s | fused GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        for name, shape in SHAPES.items():
            x = torch.randn(arguments.tokens, shape[0]).to(dtype).requires_grad_()
            grad = torch.randn(arguments.tokens, shape[1]).to(dtype)
            layers = {
                "base": build_linear(kind, *shape, dtype).train(),
                "PEFT": build_layer(kind, shape, dtype, fused=False),
                "fused": build_layer(kind, shape, dtype, fused=True),
            }
            best = time_variants(
                {n: functools.partial(forward_backward, m, x, grad) for n, m in layers.items()},
                arguments.rounds,
            )
            work = 4 * arguments.tokens * shape[0] * shape[1]
            ms = " | ".join(f"{best[n] * 1e3:.2f}" for n in layers)
            rates = " | ".join(f"{work / best[n] / 1e9:.0f}" for n in ("PEFT", "fused"))
            print(f"| {kind} | {name} {shape[0]}→{shape[1]} | {ms} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
