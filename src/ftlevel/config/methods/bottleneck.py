"""Bottleneck adapters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share

REDUCTION_FACTOR = 16.0
PARALLEL_SCALING = 4.0


class AdapterSpec(MethodSpec):
    """Bottleneck adapters: h + s · up(f(down(h))) beside or after the sub-layers of each block.

    `houlsby`: after the attention and after the feed-forward (Houlsby et al., 2019, section 2.1).
    `pfeiffer`: after the feed-forward only (Pfeiffer et al., 2021, AdapterFusion, appendix A.1),
    whose reduction factor of 16 is the default for all. `parallel`: beside the feed-forward and
    given its input, times 4 (He et al., 2022, sections 3.3 and 4.6). ReLU as in He et al.
    """

    kind: Literal["adapter"] = "adapter"
    targets_linears: ClassVar[bool] = False
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="After attention and feed-forward (houlsby), after the feed-forward "
        "(pfeiffer), or beside it (parallel).",
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
    scaling: float | None = Field(
        None,
        gt=0,
        description="What the adapter's output is multiplied by; the default is 4 for parallel "
        "and 1 otherwise.",
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
