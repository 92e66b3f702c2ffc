"""AdaLoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share

Steps = Annotated[int, Field(ge=0)] | Literal["auto"]


class AdaloraSpec(MethodSpec):
    """AdaLoRA: W + P · diag(E) · Q, whose rank is pruned by importance while training.

    Zhang et al. (2023): every linear begins with `init_r`; between the first `tinit` and the last
    `tfinal` steps the budget falls by a cubic schedule to `target_r` a linear on average
    (section 3.3). "auto" takes a tenth and three tenths of the steps.
    """

    kind: Literal["adalora"] = "adalora"
    init_r: Positive = Field(12, description="Rank of every linear at the start.")
    target_r: Positive = Field(8, description="Average rank of a linear at the end.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of the update: it is multiplied by lora_alpha / init_r."
    )
    lora_dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: TargetModules = "all-linear"
    tinit: Steps = Field("auto", description="Steps before ranks are pruned.")
    tfinal: Steps = Field("auto", description="Last steps, in which the ranks stay.")
    delta_t: Positive = Field(1, description="Steps between two prunings.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Smoothing of a weight's sensitivity.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Smoothing of its uncertainty.")
    orth_reg_weight: float = Field(
        0.5, ge=0, description="Weight of the penalty that keeps P and Q orthogonal."
    )

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaloraSpec:
        if self.target_r >= self.init_r:
            raise ValueError(
                f"method.target_r {self.target_r} is not below init_r {self.init_r}, and AdaLoRA "
                "only lowers ranks. Raise init_r, lower target_r, or use --method lora"
            )
        return self
