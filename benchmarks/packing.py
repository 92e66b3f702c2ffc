#!/usr/bin/env python3
"""Packing weights in 4 bits: ours beside bitsandbytes', in nanoseconds of processor time a weight.

    python benchmarks/packing.py
    python benchmarks/packing.py --rounds 9 --quant-type fp4 --dtype float32

Shapes are those of blocks of SmolLM2-135M and of a Llama of 7 billion parameters, random numbers,
one thread. The two take turns, and a row is the median of the rounds, so that a busy machine meets
both; the range is that of the rounds' ratios. The bytes are compared too: a difference is an error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from startup import describe_machine

from ftlevel.weights.codes import BLOCK, quantize_4bit

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096))
Pack = Callable[[torch.Tensor, str, bool], tuple[torch.Tensor, Any]]


def theirs(weight: torch.Tensor, quant_type: str, double_quant: bool) -> tuple[torch.Tensor, Any]:
    """Pack by bitsandbytes' own kernel."""
    return bnb.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=double_quant, blocksize=BLOCK
    )


def same(first: tuple[torch.Tensor, Any], second: tuple[torch.Tensor, Any]) -> bool:
    """Whether codes and scales are the same bytes."""
    (codes, state), (other_codes, other) = first, second
    return torch.equal(codes, other_codes) and torch.equal(state.absmax, other.absmax)


def measure(weight: torch.Tensor, quant_type: str, double_quant: bool, rounds: int) -> str:
    """Return a row of the table for `weight`.

    Raises:
        SystemExit: the two give other bytes.
    """
    tools: dict[str, Pack] = {"ours": quantize_4bit, "theirs": theirs}
    if not same(*(pack(weight, quant_type, double_quant) for pack in tools.values())):
        raise SystemExit(f"error: {tuple(weight.shape)}: not the bytes that bitsandbytes gives")
    found: dict[str, list[float]] = {name: [] for name in tools}
    repeats = max(1, 4_000_000 // weight.numel())
    for _ in range(rounds):
        for name, pack in tools.items():
            began = time.process_time()
            for _ in range(repeats):
                pack(weight, quant_type, double_quant)
            spent = time.process_time() - began
            found[name].append(spent * 1e9 / weight.numel() / repeats)
    ours, bitsandbytes = (statistics.median(values) for values in found.values())
    ratios = [one / other for one, other in zip(found["ours"], found["theirs"], strict=True)]
    shape = " × ".join(f"{size:,}" for size in weight.shape)
    return (
        f"| {shape} | {ours:.1f} | {bitsandbytes:.1f} | {statistics.median(ratios):.2f} | "
        f"{min(ratios):.2f}–{max(ratios):.2f} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print(f"{describe_machine()}; {arguments.quant_type} with double quantization.\n")
    print("| weight | ns a weight | bitsandbytes | ratio | over the rounds |")
    print("|---|--:|--:|--:|--:|")
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator).mul_(0.02)
        weight = weight.to(getattr(torch, arguments.dtype))
        print(measure(weight, arguments.quant_type, True, arguments.rounds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
