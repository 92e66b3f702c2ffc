"""Figures of Llama-3-8B on the simulated card, and their bounds.

The bounds are what the step had when they were written, with a few percent for other versions of
torch: they tell when it becomes worse, not how fast a card is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu_sim.cases import LLAMA_8B, TWO_STACKS, Large, run_fitted, run_large
from gpu_sim.simulate import Found

WHOLE = 32
"""Layers of the model; figures of fewer are told for a layer or for a token."""


@dataclass(frozen=True)
class Row:
    """A figure and its bound.

    Attributes:
        name: of it.
        value: what was found.
        bound: what it may be.
        is_least: whether the bound is the least that it may be; else the most.
    """

    name: str
    value: float
    bound: float
    is_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the value keeps the bound."""
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**dataclasses.asdict(self), "is_met": self.is_met}


def of_large(layers: int) -> list[Row]:
    """Return the figures of a step with `layers` of its layers.

    A step's time is that of as many layers, of the head, and of the layers that are left out, as
    long as these.
    """
    plain = Large(layers=layers)
    fewer = run_large(dataclasses.replace(plain, layers=layers // 2))
    whole = run_large(plain)
    again = run_large(dataclasses.replace(plain, train=(("gradient_checkpointing", True),)))
    a_layer = (whole.launches - fewer.launches) / (layers - layers // 2)
    states = LLAMA_8B["hidden_size"] * 2 * plain.tokens  # bytes of what a block begins with
    return [
        Row("waits in a step", sum(whole.waits.values()), 0),
        Row("waits in a step, all recomputed", sum(again.waits.values()), 0),
        Row("launches a layer, forward and backward, eager", round(a_layer, 1), 170),
        Row("KB held of a token and layer", round(_held(whole, fewer, plain) / 1e3, 1), 100),
        Row("GB held of 8,192 tokens, 32 layers, all recomputed",
            round(_extrapolate(again.kept, layers, states) / 1e9, 2), 2.7),
        Row("GB at the peak beside weights, the same",
            round(_extrapolate(again.peak, layers, states) / 1e9, 2), 8.0),
        Row("tokens a second by the roofline", round(_speed(whole, fewer, plain)), 13_000, True),
        *_with_kernels(layers // 2),
        *itertools.chain(*map(_fitted, TWO_STACKS)),
    ]  # fmt: skip


def _with_kernels(layers: int) -> list[Row]:
    """Return the figures of a step with our Triton kernels."""
    case = Large(layers=layers, kernels=True)
    half = layers // 2

    def run(case: Large) -> tuple[float, int]:
        whole, fewer = run_large(case), run_large(dataclasses.replace(case, layers=half))
        return _speed(whole, fewer, case), whole.launches - fewer.launches

    speed, launches = run(case)
    again, _ = run(dataclasses.replace(case, train=(("gradient_checkpointing", True),)))
    slower, _ = run(dataclasses.replace(case, four_bits=True))
    return [
        Row("launches a layer, with Triton kernels", round(launches / (layers - half), 1), 90),
        Row("tokens a second by the roofline, the same", round(speed), 18_000, True),
        Row("the same, all recomputed", round(again), 13_500, True),
        Row("QLoRA's time beside LoRA's, both with kernels", round(speed / slower, 3), 1.08),
    ]  # fmt: skip


FREE_FOR = {"t5": 6 * 10**9, "bart": 4 * 10**9}
"""Bytes on the card for a step of two stacks: too few for all that it would hold."""


def _fitted(family: str) -> list[Row]:
    """Return the figures of an encoder–decoder whose blocks are recomputed by auto."""
    found = run_fitted(family, FREE_FOR[family])
    return [
        Row(f"{family}: blocks of {found.blocks} recomputed by auto", found.recomputed,
            found.blocks - 1),
        Row(f"{family}: GB held, of those that are free", round(found.kept / 1e9, 2),
            FREE_FOR[family] / 1e9),
    ]  # fmt: skip


def _held(whole: Found, fewer: Found, case: Large) -> float:
    """Return the bytes that the graph holds of each token in a layer."""
    return (whole.kept - fewer.kept) / (case.layers - case.layers // 2) / case.tokens


def _extrapolate(size: int, layers: int, states: int) -> float:
    """Return `size` with what the layers that are left out begin with."""
    return size + (WHOLE - layers) * states


def _speed(whole: Found, fewer: Found, case: Large) -> float:
    """Return the tokens a second of all layers."""
    seconds, less = (sum(found.seconds.values()) for found in (whole, fewer))
    a_layer = (seconds - less) / (case.layers - case.layers // 2)
    return case.tokens / (seconds + a_layer * (WHOLE - case.layers))


def format_table(rows: Sequence[Row]) -> str:
    """Return the figures beside their bounds, a line each."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        sign = "≥" if row.is_least else "≤"
        verdict = "" if row.is_met else "  NOT MET"
        lines.append(f"{row.name:{width}}  {row.value:>10,}  {sign} {row.bound:>8,}{verdict}")
    return "\n".join(lines)
