"""Figures of Llama-3-8B on the simulated GPU, and their bounds.

Bounds are the values of the step when they were written, plus a few percent for other torch
versions: they detect regressions and do not state the speed of a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_sim.cases import LLAMA_8B, LargeCase, run_large_case
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
        *_compute_kernel_figures(layers // 2),
    ]  # fmt: skip


def _compute_kernel_figures(layers: int) -> list[Row]:
    """Return the figures of a step with Triton kernels."""
    case = LargeCase(layers=layers, kernels=True)
    half = layers // 2

    def measure(case: LargeCase) -> tuple[float, int]:
        full, fewer = run_large_case(case), run_large_case(dataclasses.replace(case, layers=half))
        return _tokens_per_second(full, fewer, case), full.launches - fewer.launches

    speed, launches = measure(case)
    recomputed, _ = measure(dataclasses.replace(case, train=(("gradient_checkpointing", True),)))
    quantized, _ = measure(dataclasses.replace(case, four_bits=True))
    return [
        Row("launches per layer, Triton kernels", round(launches / (layers - half), 1), 90),
        Row("tokens per second (roofline), Triton kernels", round(speed), 18_000, True),
        Row("tokens per second (roofline), Triton kernels, all blocks recomputed",
            round(recomputed), 13_500, True),
        Row("time of QLoRA relative to LoRA, Triton kernels", round(speed / quantized, 3), 1.08),
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
