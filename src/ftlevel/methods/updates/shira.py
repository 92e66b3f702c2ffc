"""SHiRA: builds `peft.ShiraConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.updates.shira import ShiraSpec
from ftlevel.errors import ConfigError
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import FULL_RANK, PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.methods.updates.fit import LINEARS_ONLY
from ftlevel.methods.upstream import draw_shira_mask


def build(spec: ShiraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import ShiraConfig

    config = ShiraConfig(
        **base.shared,
        r=spec.r,
        random_seed=spec.random_seed,
    )
    forget_mask(config)
    return config


def forget_mask(config: Any) -> None:
    """Make `config` (mutated) skip random masks for meta weights."""
    config.mask_fn = draw_shira_mask


def check(spec: ShiraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` if a linear layer has too few weights for r."""
    room = {
        name: fan_in * fan_out // (fan_in + fan_out) for name, (fan_in, fan_out) in sizes.items()
    }
    small = [name for name, most in room.items() if most < spec.r]
    if small:
        raise ConfigError(
            f"method.r {spec.r} asks for more weights than {len(small):,} of {len(sizes):,} "
            f"linears have, such as {small[0]}. Set method.r to {min(room.values())} or less."
        )


_METHOD = Method(
    (
        MethodFacts(
            "shira",
            "shira",
            "--method shira",
            "a few weights of every linear, drawn at random",
            MERGES,
            "Bhardwaj et al., 2024, arXiv:2406.13175",
            79_953_920,
        ),
    ),
    rate=Rates(narrow=1e-3, wide=3e-4, source="PEFT's method comparison"),
    build=build,
    rules=(LINEARS_ONLY,),
    check=check,
    merging=Merging(("SHIRA",), prepare=forget_mask, plain_form=PlainForm(never=FULL_RANK)),
)
METHODS = {"shira": _METHOD}
