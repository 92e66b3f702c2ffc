"""What several of these methods ask of the linears that they change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ftlevel.errors import ConfigError, listing
from ftlevel.methods.facts import CONV1D, Rule, rows

LINEARS_ONLY = Rule(
    rows("miss", "shira", "c3a"), "its linears are Conv1D, which PEFT does not take here",
    "Use --method lora, or --quant 4bit, which makes them linears.",
    families=CONV1D, quants=frozenset({"none"}),
)  # fmt: skip


def check_divides(
    field: str, size: int, sizes: Mapping[str, tuple[int, int]], *, outputs: bool = False
) -> None:
    """Check that blocks fill every linear.

    Args:
        field: the spec's, of the blocks' side or number.
        size: its value.
        sizes: name of a linear → (in, out).
        outputs: whether the output is cut into blocks too.

    Raises:
        ConfigError: one has a side that is no multiple.
    """
    sides = {name: pair if outputs else pair[:1] for name, pair in sizes.items()}
    odd = {name: width for name, pair in sides.items() for width in pair if width % size}
    if not odd:
        return
    name, width = next(iter(odd.items()))
    common = math.gcd(*(width for pair in sides.values() for width in pair))
    fits = [n for n in range(2, min(common, 64) + 1) if common % n == 0]
    way = (
        f"Set method.{field} to one of {listing(map(str, fits), 8)}."
        if fits
        else "Leave out these modules with --target-modules."
    )
    what = "inputs or outputs" if outputs else "inputs"
    raise ConfigError(
        f"method.{field} {size} does not divide the {what} of {len(odd):,} of {len(sizes):,} "
        f"linears, such as {name} ({width:,} wide). {way}"
    )
