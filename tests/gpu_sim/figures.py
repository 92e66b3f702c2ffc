"""Figures of Llama-3-8B on the simulated GPU, and their bounds.

Bounds are the values of the step when they were written, plus a few percent for other torch
versions: they detect regressions and do not state the speed of a GPU.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

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
        Row("time of QLoRA relative to LoRA", round(
            _tokens_per_second(full, fewer, plain) / _speed_in_4_bits(layers), 3), 1.08),
    ]  # fmt: skip


def _speed_in_4_bits(layers: int) -> float:
    """Return the tokens per second on a 4-bit base."""
    case = LargeCase(layers=layers, four_bits=True)
    fewer = run_large_case(dataclasses.replace(case, layers=layers // 2))
    return _tokens_per_second(run_large_case(case), fewer, case)


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


def main() -> int:
    """Print the figures, and return 1 if one exceeds its bound."""
    rows = compute_figures(layers=4)
    print(format_table(rows))
    return int(any(not row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
