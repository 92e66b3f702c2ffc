"""Figures of Llama-3-8B on the simulated GPU, and their bounds.

Bounds are the values of the step when they were written, plus a few percent for other torch
versions: they detect regressions and do not state the speed of a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_sim.cases import (
    LAYERS,
    LLAMA_8B,
    TWO_STACKS,
    LargeCase,
    run_large_case,
    run_with_auto_checkpointing,
)
from gpu_sim.simulate import StepMetrics

NUM_LAYERS = 32
"""Layers of the model; figures of fewer layers are given per layer or per token."""


@dataclass(frozen=True)
class Row:
    """A figure and its bound.

    Attributes:
        name: its description.
        value: the simulated value.
        bound: the maximum, or the minimum with `is_least`.
        is_least: whether the bound is a minimum.
    """

    name: str
    value: float
    bound: float
    is_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the value is within the bound."""
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {**dataclasses.asdict(self), "is_met": self.is_met}


def compute_figures(layers: int) -> list[Row]:
    """Return the figures of a step with `layers` layers.

    Time is extrapolated from these layers and the head to the full model.
    """
    plain = LargeCase(layers=layers)
    fewer = run_large_case(dataclasses.replace(plain, layers=layers // 2))
    full = run_large_case(plain)
    recomputed = run_large_case(
        dataclasses.replace(plain, train=(("gradient_checkpointing", True),))
    )
    launches_per_layer = (full.launches - fewer.launches) / (layers - layers // 2)
    states = LLAMA_8B["hidden_size"] * 2 * plain.tokens  # bytes of a block's input
    return [
        Row("waits in a step", sum(full.waits.values()), 0),
        Row("waits in a step, all blocks recomputed", sum(recomputed.waits.values()), 0),
        Row("launches per layer, forward and backward, eager", round(launches_per_layer, 1), 170),
        Row("KB saved per token and layer", round(_saved_bytes(full, fewer, plain) / 1e3, 1), 100),
        Row("GB saved for 8,192 tokens, 32 layers, all blocks recomputed",
            round(_extrapolate(recomputed.kept, layers, states) / 1e9, 2), 2.7),
        Row("peak GB besides weights, all blocks recomputed",
            round(_extrapolate(recomputed.peak, layers, states) / 1e9, 2), 8.0),
        Row("tokens per second (roofline)", round(_tokens_per_second(full, fewer, plain)), 13_000,
            True),
        _compare_qlora(layers // 2),
        *itertools.chain(*(_compute_checkpointing_figures(name, layers) for name in TWO_STACKS)),
    ]  # fmt: skip


def _compare_qlora(layers: int) -> Row:
    """Return the time of a step with a base in 4 bits, relative to bfloat16."""

    def measure(case: LargeCase) -> float:
        fewer = run_large_case(dataclasses.replace(case, layers=layers // 2))
        return _tokens_per_second(run_large_case(case), fewer, case)

    case = LargeCase(layers=layers)
    ratio = measure(case) / measure(dataclasses.replace(case, four_bits=True))
    return Row("time of QLoRA relative to LoRA", round(ratio, 3), 1.08)


FREE_BYTES = {"t5": 6 * 10**9, "bart": 4 * 10**9}
"""Free bytes for a step of two whole stacks: too few to save all activations."""


def _compute_checkpointing_figures(family: str, layers: int) -> list[Row]:
    """Return the figures of an encoder-decoder with automatic checkpointing.

    With fewer layers than the model has, as large a share of the memory is free.
    """
    all_layers = TWO_STACKS[family][LAYERS[family][0]]
    layers = min(layers, all_layers)
    free = FREE_BYTES[family] * layers // all_layers
    step = run_with_auto_checkpointing(family, free, layers)
    return [
        Row(f"{family}: blocks of {step.blocks} recomputed by auto", step.recomputed,
            step.blocks - 1),
        Row(f"{family}: GB saved, within free memory", round(step.kept / 1e9, 2),
            round(free / 1e9, 2)),
    ]  # fmt: skip


def _saved_bytes(full: StepMetrics, fewer: StepMetrics, case: LargeCase) -> float:
    """Return the bytes that the graph saves per token and layer."""
    return (full.kept - fewer.kept) / (case.layers - case.layers // 2) / case.tokens


def _extrapolate(size: int, layers: int, states: int) -> float:
    """Return `size` plus the block inputs of the missing layers."""
    return size + (NUM_LAYERS - layers) * states


def _tokens_per_second(full: StepMetrics, fewer: StepMetrics, case: LargeCase) -> float:
    """Return the tokens per second of the full model."""
    seconds, fewer_seconds = (sum(metrics.seconds.values()) for metrics in (full, fewer))
    seconds_per_layer = (seconds - fewer_seconds) / (case.layers - case.layers // 2)
    return case.tokens / (seconds + seconds_per_layer * (NUM_LAYERS - case.layers))


def format_table(rows: Sequence[Row]) -> str:
    """Return one line per figure, with its bound."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        sign = "≥" if row.is_least else "≤"
        verdict = "" if row.is_met else "  NOT MET"
        lines.append(f"{row.name:{width}}  {row.value:>10,}  {sign} {row.bound:>8,}{verdict}")
    return "\n".join(lines)
