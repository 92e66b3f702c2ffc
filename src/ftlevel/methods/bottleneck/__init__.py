"""Bottleneck adapters: spec → `BottleneckConfig`, a tuner that PEFT itself does not have.

config, layer and model are a PEFT method as PEFT's own are; they import peft and are only imported
when one is built or loaded. `sites` says where adapters go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.bottleneck import (
    ON_RESIDUAL,
    REDUCTION_FACTOR,
    AdapterSpec,
    default_scaling,
)
from ftlevel.errors import InputError, listing
from ftlevel.methods.base import Base, Merging, Method, StepSupport
from ftlevel.methods.bottleneck.page import PAGE
from ftlevel.methods.bottleneck.sites import SITES, site_pattern, sites_of, why_no_residual
from ftlevel.methods.facts import MethodFacts
from ftlevel.methods.rates import Rates
from ftlevel.methods.upstream import register_tuner


def register() -> None:
    """Make PEFT know the tuner."""
    from ftlevel.methods.bottleneck.config import BOTTLENECK, BottleneckConfig
    from ftlevel.methods.bottleneck.model import BottleneckModel

    register_tuner(BOTTLENECK, BottleneckConfig, BottleneckModel)


def build(spec: AdapterSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    register()
    from ftlevel.methods.bottleneck.config import BottleneckConfig

    return BottleneckConfig(
        **base.shared,
        placement=spec.placement,
        bottleneck_dim=spec.bottleneck_dim,
        reduction_factor=spec.reduction_factor or REDUCTION_FACTOR,
        non_linearity=spec.non_linearity,
        adapter_dropout=spec.adapter_dropout,
        scaling=spec.scaling,
    )


def find_targets(spec: AdapterSpec, model: Any) -> list[str]:
    """Return the full names of the modules in `model` that get an adapter, sorted.

    Raises:
        InputError: the family's positions are not known.
    """
    sites = sites_of(model.config)
    if sites is None:
        raise InputError(
            f"--method adapter: no positions are known for {model.config.model_type!r}. Families: "
            f"{listing(SITES, most=len(SITES))}. Name the last linears of its sub-layers with "
            "--target-modules, or use --method lora."
        )
    pattern = re.compile(site_pattern(sites, spec.placement))
    return sorted(name for name, _ in model.named_modules() if pattern.fullmatch(name))


def describe(spec: AdapterSpec) -> str:
    """Return the settings in a line."""
    width = f"reduction {spec.reduction_factor or REDUCTION_FACTOR:g}"
    if spec.bottleneck_dim is not None:
        width = f"bottleneck {spec.bottleneck_dim}"
    scaling = spec.scaling or default_scaling(spec.placement)
    factor = scaling if isinstance(scaling, str) else f"{scaling:g}"
    dropout = f", dropout {spec.adapter_dropout:g}" if spec.adapter_dropout else ""
    return f"{spec.placement}, {width}, {spec.non_linearity}, scaling {factor}{dropout}"


def against_workers(spec: AdapterSpec) -> str:
    """Return what a forward pass changes in the model; empty if nothing."""
    if spec.placement in ("parallel", *ON_RESIDUAL):
        return f"{spec.placement} adapters keep their input in the model"
    return ""


def against_pruning(spec: AdapterSpec) -> str:
    """Return why every token must go through the last block; empty if it need not."""
    return f"{spec.placement} adapters read the residual" if spec.placement in ON_RESIDUAL else ""


def refuse(spec: AdapterSpec, model_config: Any, _kind: str, _task: str, _quant: str) -> str | None:
    """Return why adapters of this placement have no position in a model; None if they have."""
    reason = why_no_residual(model_config, spec.placement)
    return f"{reason}. Use placement houlsby, pfeiffer or parallel." if reason else None


def why_not_mergeable(_config: Mapping[str, Any]) -> str:
    """Return why no adapter of this type can be merged."""
    from ftlevel.methods.bottleneck.layer import CANNOT_MERGE

    return CANNOT_MERGE


def find_rates(spec: AdapterSpec) -> Rates:
    """Return the rates: twice as much where a block has one and not two, but on decoders.

    A third where what is added is scaled up, as it is by 4 in parallel.
    """
    scaling = default_scaling(spec.placement) if spec.scaling is None else spec.scaling
    if isinstance(scaling, float) and scaling > 1:
        return Rates(narrow=1e-3, wide=1e-4, source="a third of Houlsby et al., section 3.2")
    narrow = 6e-3 if spec.placement == "pfeiffer" else 3e-3
    return Rates(
        narrow=narrow,
        wide=3e-4,
        source="Houlsby et al., section 3.2",
        kinds={"decoder": 3e-3},
    )


_METHOD = Method(
    (
        MethodFacts(
            "adapter", "adapter", "--method adapter", "two small layers inside every block", "",
            "Houlsby et al., 2019, arXiv:1902.00751", 134_496_256,
        ),
    ),
    rate=find_rates,
    build=build,
    register=register,
    find_targets=find_targets,
    describe=describe,
    refuse=refuse,
    step=StepSupport(workers=against_workers, pruning=against_pruning),
    merging=Merging(("BOTTLENECK",), into_weights=False, why_not=why_not_mergeable),
    page=PAGE,
)  # fmt: skip
METHODS = {"adapter": _METHOD}
