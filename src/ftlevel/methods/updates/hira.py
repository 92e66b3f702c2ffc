"""HiRA: builds `peft.HiraConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.updates.hira import HiraSpec
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import FULL_RANK, PlainForm
from ftlevel.methods.rates import Rates


def build(spec: HiraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import HiraConfig

    return HiraConfig(
        **base.shared,
        r=spec.r,
        hira_dropout=spec.hira_dropout,
        fan_in_fan_out=base.fan_in_fan_out,
    )


_METHOD = Method(
    (
        MethodFacts(
            "hira",
            "hira",
            "--method hira",
            "a low-rank factor of every weight",
            MERGES,
            "Huang et al., 2025, ICLR (openreview TwJrTz9cRS)",
            79_953_920,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=4.5e-3, source="PEFT's method comparison"),
    build=build,
    merging=Merging(("HIRA",), plain_form=PlainForm(never=FULL_RANK)),
)
METHODS = {"hira": _METHOD}
