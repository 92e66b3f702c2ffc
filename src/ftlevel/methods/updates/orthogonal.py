"""OFT and BOFT: builds `peft.OFTConfig` and `peft.BOFTConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.updates.orthogonal import BoftSpec, OftSpec
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import CONV1D, MERGES, MethodFacts, Rule, rows
from ftlevel.methods.plain_form import FULL_RANK, PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.methods.updates.fit import check_divides


def build_oft(spec: OftSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import OFTConfig

    return OFTConfig(
        **base.shared,
        r=0,
        oft_block_size=spec.oft_block_size,
        module_dropout=spec.module_dropout,
        block_share=spec.block_share,
        use_cayley_neumann=spec.use_cayley_neumann,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def build_boft(spec: BoftSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import BOFTConfig

    return BOFTConfig(
        **base.shared,
        boft_block_size=spec.boft_block_size,
        boft_n_butterfly_factor=1,
        boft_dropout=spec.boft_dropout,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def check_oft(spec: OftSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer; PEFT would adjust it with a warning."""
    check_divides("oft_block_size", spec.oft_block_size, sizes)


def check_boft(spec: BoftSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer."""
    check_divides("boft_block_size", spec.boft_block_size, sizes)


_RULES = (
    Rule(
        rows("oft", "boft"),
        "its linears are Conv1D, which PEFT has no rotation for",
        "Use --method lora, or --quant 4bit, which makes them linears.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
)
_OFT = Method(
    (
        MethodFacts(
            "oft",
            "oft",
            "--method oft",
            "a rotation of every linear's input",
            MERGES,
            "Qiu et al., 2023, arXiv:2306.07280; 2025, arXiv:2506.19847",
            17_649_664,
        ),
    ),
    rate=Rates(narrow=1e-3, wide=3e-4, source="not measured", kinds={"decoder": 3e-4}),
    build=build_oft,
    rules=_RULES,
    check=check_oft,
    merging=Merging(("OFT",), plain_form=PlainForm(never=FULL_RANK)),
)
_BOFT = Method(
    (
        MethodFacts(
            "boft",
            "boft",
            "--method boft",
            "a rotation of every linear's input, in small blocks",
            MERGES,
            "Liu et al., 2024, arXiv:2311.06243",
            5_914_624,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=4e-4, source="not measured", kinds={"decoder": 3e-3}),
    build=build_boft,
    rules=_RULES,
    check=check_boft,
    merging=Merging(("BOFT",), plain_form=PlainForm(never=FULL_RANK)),
)
METHODS = {"oft": _OFT, "boft": _BOFT}
