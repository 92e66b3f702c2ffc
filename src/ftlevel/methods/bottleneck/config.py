"""The `peft` config of a bottleneck adapter: what adapter_config.json holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from peft import PeftConfig
from transformers.activations import ACT2FN

from ftlevel.config.methods.bottleneck import REDUCTION_FACTOR, Placement, default_scaling
from ftlevel.methods.upstream import add_peft_type

BOTTLENECK = add_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of `BottleneckModel`.

    Attributes:
        placement: houlsby, pfeiffer, seq_bn, parallel, par_bn or adapter_plus.
        bottleneck_dim: width of the bottleneck; by `reduction_factor` if None.
        reduction_factor: hidden size / width of the bottleneck.
        non_linearity: activation by transformers' name.
        adapter_dropout: dropout on the bottleneck's activations in training.
        scaling: factor of the adapter's output, or learned, or channel; None becomes 4 for parallel
            and par_bn, channel for adapter_plus and 1 otherwise.
        target_modules: names or one regular expression; None is the family's positions.
        exclude_modules: names or one regular expression that are left out.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: begin as the identity; False draws the up-projection too, for tests.
    """

    placement: str = field(default="houlsby")
    bottleneck_dim: int | None = field(default=None)
    reduction_factor: float = field(default=REDUCTION_FACTOR)
    non_linearity: str = field(default="relu")
    adapter_dropout: float = field(default=0.0)
    scaling: float | str | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement {self.placement!r} is none of {', '.join(get_args(Placement))}."
            )
        if self.non_linearity not in ACT2FN:
            raise ValueError(
                f"non_linearity {self.non_linearity!r} is no activation of transformers, such as "
                "relu, gelu or silu."
            )
        if self.scaling is None:
            self.scaling = default_scaling(self.placement)
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ValueError(f"scaling {self.scaling!r} is no number, learned or channel.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):  # PEFT compares these as sets
                setattr(self, name, set(value))
