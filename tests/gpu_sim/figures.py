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
        bound: the maximum.
    """

    name: str
    value: float
    bound: float


def compute_figures(layers: int) -> list[Row]:
    """Return the figures of a step with `layers` layers."""
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
    ]  # fmt: skip


def _saved_bytes(full: StepMetrics, fewer: StepMetrics, case: LargeCase) -> float:
    """Return the bytes that the graph saves per token and layer."""
    return (full.kept - fewer.kept) / (case.layers - case.layers // 2) / case.tokens


def _extrapolate(size: int, layers: int, states: int) -> float:
    """Return `size` plus the block inputs of the missing layers."""
    return size + (NUM_LAYERS - layers) * states


def format_table(rows: Sequence[Row]) -> str:
    """Return one line per figure, with its bound."""
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{row.name:{width}}  {row.value:>10,}  ≤ {row.bound:>8,}"
        + ("" if row.value <= row.bound else "  NOT MET")
        for row in rows
    )


def main() -> int:
    """Print the figures, and return 1 if one exceeds its bound."""
    rows = compute_figures(layers=4)
    print(format_table(rows))
    return int(any(row.value > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
