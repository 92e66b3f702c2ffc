"""Bottleneck adapters."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share

REDUCTION_FACTOR = 16.0
PARALLEL_SCALING = 4.0

Placement = Literal["houlsby", "pfeiffer", "seq_bn", "parallel", "par_bn", "adapter_plus"]
ON_RESIDUAL = ("seq_bn", "par_bn", "adapter_plus")
"""Placements that read the residual of a feed-forward, so that they need a family's positions."""


def default_scaling(placement: str) -> float | str:
    """Return what an adapter's output is multiplied by where the user gives nothing."""
    if placement == "adapter_plus":
        return "channel"  # Steitz & Roth, 2024, section 3.3
    return PARALLEL_SCALING if placement in ("parallel", "par_bn") else 1.0


class AdapterSpec(MethodSpec):
    """Bottleneck adapters: h + s · up(f(down(x))) beside or after the sub-layers of each block.

    `houlsby`: after the attention and after the feed-forward (Houlsby et al., 2019, section 2.1).
    `seq_bn`: after the feed-forward only, reading its sum with the residual, through the layer
    norm where one follows (Pfeiffer et al., 2021, AdapterFusion, appendix A.1, whose reduction
    factor of 16 is the default for all). `pfeiffer`: the same place, reading the feed-forward's
    output alone, as houlsby does. `par_bn`: beside the feed-forward, reading the residual, times 4
    (He et al., 2022, sections 3.3 and 4.6). `parallel`: reading what the feed-forward's first
    linear reads, which in pre-norm models comes after the norm. `adapter_plus`: after the block,
    with a learned factor a channel (Steitz & Roth, 2024). ReLU as in He et al. The names seq_bn and
    par_bn are AdapterHub's; `sites` in `ftlevel.methods.bottleneck` has the formulas.
    """

    kind: Literal["adapter"] = "adapter"
    targets_linears: ClassVar[bool] = False
    placement: Placement = Field(
        "houlsby",
        description="After attention and feed-forward (houlsby); after the feed-forward, reading "
        "its sum with the residual (seq_bn, AdapterHub's pfeiffer) or its output alone (pfeiffer); "
        "beside it, reading the residual (par_bn) or its normed input (parallel); after the block, "
        "scaled a channel (adapter_plus).",
    )
    reduction_factor: float | None = Field(
        None,
        ge=1,
        description="The bottleneck is the hidden size divided by this; the default is 16.",
    )
    bottleneck_dim: Positive | None = Field(
        None, description="Width of the bottleneck, in place of reduction_factor."
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh", "leaky_relu"] = Field(
        "relu", description="Activation between the two projections."
    )
    adapter_dropout: Share = Field(0.0, description="Dropout on the bottleneck's activations.")
    scaling: Annotated[float, Field(gt=0)] | Literal["learned", "channel"] | None = Field(
        None,
        description="What the adapter's output is multiplied by: a number, one that is learned, or "
        "one a channel. The default is 4 for parallel and par_bn, channel for adapter_plus, and 1 "
        "otherwise.",
    )
    target_modules: TargetModules | None = Field(
        None,
        description="Linears to put an adapter after, in place of the family's positions. A "
        "parallel adapter on a linear that does not end a feed-forward gets that linear's input.",
    )

    @model_validator(mode="after")
    def _one_width(self) -> AdapterSpec:
        if self.reduction_factor is not None and self.bottleneck_dim is not None:
            raise ValueError(
                f"reduction_factor {self.reduction_factor:g} and bottleneck_dim "
                f"{self.bottleneck_dim} both set the width of the bottleneck; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _own_positions(self) -> AdapterSpec:
        if self.target_modules is not None and self.placement in ON_RESIDUAL:
            raise ValueError(
                f"placement {self.placement} reads the residual of a feed-forward, which is known "
                "of a family's own positions only; drop target_modules, or use placement houlsby, "
                "pfeiffer or parallel"
            )
        return self
