"""Bottleneck adapters: builds `BottleneckConfig` for a tuner of ftlevel.

`sites` has the adapter positions of each model family. The submodules import peft and are imported
only when needed. The text constants here are part of docs/methods.md.
"""

from __future__ import annotations

import re
from typing import Any

from ftlevel.config.methods.bottleneck import (
    ON_RESIDUAL,
    REDUCTION_FACTOR,
    AdapterSpec,
    default_scaling,
)
from ftlevel.errors import InputError
from ftlevel.methods.base import Base, Merging, Method, StepSupport
from ftlevel.methods.bottleneck.sites import SITES, site_pattern, sites_of, why_no_residual
from ftlevel.methods.facts import single_row
from ftlevel.methods.rates import Rates

_INTRODUCTION = """\
`--set method.placement=…` says where an adapter A(·) = s · up(f(down(·))) stands. h is the output
of the feed-forward, r the residual that it is added to, x what its first linear is given, and LN
the layer norm that follows the sum in post-norm models (BERT, BART). In those x is r; in pre-norm
ones (GPT-2, Llama, T5) x is r after its norm.
"""

_ROWS = (
    ("placement", "paper", "the adapter adds to", "reads: post-norm", "reads: pre-norm",
     "in AdapterHub"),
    ("---",) * 6,
    ("`houlsby`", "Houlsby et al., 2019, section 2.1", "h, and the output of each attention", "h",
     "h", "`double_seq_bn`, formerly `houlsby`; with `cross_adapter` in an encoder-decoder"),
    ("`seq_bn`", "Pfeiffer et al., 2021, arXiv:2005.00247, appendix A.1", "h", "LN(h + r)", "h + r",
     "`seq_bn`, formerly `pfeiffer`"),
    ("`pfeiffer`", "the same place, read as Houlsby et al. read it", "h", "h", "h",
     "`double_seq_bn` with `mh_adapter=False`"),
    ("`par_bn`", "He et al., 2022, arXiv:2110.04366, section 3.3; s = 4", "h", "r", "r",
     "`par_bn`, formerly `parallel`; `scaled_par_bn` with `method.scaling=learned`"),
    ("`parallel`", "the same, read as the feed-forward itself reads; s = 4", "h", "x = r", "x",
     "`par_bn` in post-norm models, else none"),
    ("`adapter_plus`", "Steitz & Roth, 2024, arXiv:2406.06820; s is learned, one a channel",
     "the block's output y", "y = LN(h + r)", "y = h + r",
     "`AdapterPlusConfig` with `stochastic_depth=0`"),
)  # fmt: skip

_MORE = """
An adapter called `pfeiffer` or `parallel` computes what it computed in 0.1.0. `seq_bn`, `par_bn`
and `adapter_plus` need a residual that the feed-forward alone is added to: GPT-J, GPT-NeoX, Phi,
Falcon (attention and feed-forward together), Gemma 2 and 3, OLMo 2 and Granite (another norm or a
factor before the sum) have the other three. All begin as the identity, with up at zero, as
`par_bn` there; AdapterHub draws the others at random. In training a model's own dropout comes
after the adapter here and before it there, and `adapter_dropout` is on the bottleneck here and on
the output there. [Export](export.md#adapterhub) says how adapters go there and come back."""

PAGE = "\n".join([_INTRODUCTION, *(f"| {' | '.join(row)} |" for row in _ROWS), _MORE])


CANNOT_MERGE = (
    "A bottleneck adapter is not linear in the hidden state, so no weight of the base model can "
    "hold it and it cannot be merged. Keep it separate from the base, which costs two small matrix "
    "products a site, or train with a method that merges, such as --method lora."
)


class Bottleneck(Method):
    """Bottleneck adapters."""

    facts = single_row(
        "adapter",
        "two small layers inside every block",
        "",
        "Houlsby et al., 2019, arXiv:1902.00751",
        134_496_256,
    )
    tuner = "ftlevel.methods.bottleneck.layer"
    step = StepSupport(
        workers=lambda spec: (
            f"{spec.placement} adapters keep their input in the model"
            if spec.placement in ("parallel", *ON_RESIDUAL)
            else ""
        ),
        pruning=lambda spec: (
            f"{spec.placement} adapters read the residual" if spec.placement in ON_RESIDUAL else ""
        ),
    )
    merging = Merging(("BOTTLENECK",), into_weights=False, why_not=lambda _: CANNOT_MERGE)
    page = PAGE

    def rates(self, spec: AdapterSpec) -> Rates:
        """Returns the rates: double for one adapter per block, a third for scaling above 1."""
        scaling = default_scaling(spec.placement) if spec.scaling is None else spec.scaling
        if isinstance(scaling, float) and scaling > 1:
            return Rates(narrow=1e-3, wide=1e-4, source="a third of Houlsby et al., section 3.2")
        narrow = 6e-3 if spec.placement == "pfeiffer" else 3e-3
        source = "Houlsby et al., section 3.2"
        return Rates(narrow=narrow, wide=3e-4, source=source, kinds={"decoder": 3e-3})

    def describe(self, spec: AdapterSpec) -> str:
        """Returns placement, width, activation, scaling and dropout."""
        width = f"reduction {spec.reduction_factor or REDUCTION_FACTOR:g}"
        if spec.bottleneck_dim is not None:
            width = f"bottleneck {spec.bottleneck_dim}"
        scaling = spec.scaling or default_scaling(spec.placement)
        factor = scaling if isinstance(scaling, str) else f"{scaling:g}"
        dropout = f", dropout {spec.adapter_dropout:g}" if spec.adapter_dropout else ""
        return f"{spec.placement}, {width}, {spec.non_linearity}, scaling {factor}{dropout}"

    def refuse(self, spec: AdapterSpec, config: Any, *_: str) -> str | None:
        """Returns why a model does not support the placement and which it does, or None."""
        reason = why_no_residual(config, spec.placement)
        return f"{reason}. Use placement houlsby, pfeiffer or parallel." if reason else None

    def find_targets(self, spec: AdapterSpec, model: Any) -> list[str]:
        """Returns the sorted names of adapted modules; raises `InputError` if unknown."""
        sites = sites_of(model.config)
        if sites is None:
            raise InputError(
                f"--method adapter: no positions are known for {model.config.model_type!r}. "
                f"Families: {', '.join(SITES)}. Name the last linears of its sub-layers with "
                "--target-modules, or use --method lora."
            )
        pattern = re.compile(site_pattern(sites, spec.placement))
        return sorted(name for name, _ in model.named_modules() if pattern.fullmatch(name))

    def build(self, spec: AdapterSpec, base: Base) -> Any:
        """Returns `BottleneckConfig`."""
        from ftlevel.methods.bottleneck.layer import BottleneckConfig

        return BottleneckConfig(
            **base.shared,
            placement=spec.placement,
            bottleneck_dim=spec.bottleneck_dim,
            reduction_factor=spec.reduction_factor or REDUCTION_FACTOR,
            non_linearity=spec.non_linearity,
            adapter_dropout=spec.adapter_dropout,
            scaling=spec.scaling,
        )


METHODS = {"adapter": Bottleneck()}
