"""C³A: builds `peft.C3AConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.updates.c3a import C3aSpec
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import FULL_RANK, PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.methods.updates.fit import LINEARS_ONLY, check_divides
from ftlevel.methods.upstream import copy_base_outputs


def build(spec: C3aSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import C3AConfig

    return C3AConfig(
        **base.shared,
        block_size=spec.block_size,
        init_weights=True,
    )


def check(spec: C3aSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer."""
    check_divides("block_size", spec.block_size, sizes, outputs=True)


_METHOD = Method(
    (
        MethodFacts(
            "c3a",
            "c3a",
            "--method c3a",
            "circulant blocks beside every linear",
            MERGES,
            "Chen et al., 2024, arXiv:2407.19342",
            101_187_584,
        ),
    ),
    rate=Rates(narrow=3e-1, wide=3e-1, source="PEFT's method comparison"),
    build=build,
    rules=(LINEARS_ONLY,),
    check=check,
    prepare=copy_base_outputs,
    merging=Merging(("C3A",), plain_form=PlainForm(never=FULL_RANK)),
)
METHODS = {"c3a": _METHOD}
