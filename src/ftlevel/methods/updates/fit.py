"""Checks of linear layers that several methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ftlevel.errors import ConfigError, join_names
from ftlevel.methods.facts import CONV1D, Rule, rows

LINEARS_ONLY = Rule(
    rows("miss", "shira", "c3a"),
    "its linears are Conv1D, which PEFT does not take here",
    "Use --method lora, or --quant 4bit, which makes them linears.",
    families=CONV1D,
    quants=frozenset({"none"}),
)


def check_divides(
    field: str, size: int, sizes: Mapping[str, tuple[int, int]], *, outputs: bool = False
) -> None:
    """Raise `ConfigError` if `size` does not divide the (in, out) in `sizes`; out if `outputs`."""
    sides = {name: pair if outputs else pair[:1] for name, pair in sizes.items()}
    odd = {name: width for name, pair in sides.items() for width in pair if width % size}
    if not odd:
        return
    name, width = next(iter(odd.items()))
    common = math.gcd(*(width for pair in sides.values() for width in pair))
    fits = [n for n in range(2, min(common, 64) + 1) if common % n == 0]
    way = (
        f"Set method.{field} to one of {join_names(map(str, fits), 8)}."
        if fits
        else "Leave out these modules with --target-modules."
    )
    what = "inputs or outputs" if outputs else "inputs"
    raise ConfigError(
        f"method.{field} {size} does not divide the {what} of {len(odd):,} of {len(sizes):,} "
        f"linears, such as {name} ({width:,} wide). {way}"
    )
