"""AdaLoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share

Steps = Annotated[int, Field(ge=0)] | Literal["auto"]


class AdaloraSpec(MethodSpec):
    """AdaLoRA: W + P · diag(E) · Q, whose rank is pruned by importance during training.

    Zhang et al. (2023), section 3.3: ranks start at `init_r` and fall on a cubic schedule to
    `target_r` on average, after the first `tinit` and before the last `tfinal` steps. "auto" uses
    10 % and 30 % of the steps.
    """

    kind: Literal["adalora"] = "adalora"
    init_r: Positive = Field(12, description="Initial rank of every linear layer.")
    target_r: Positive = Field(8, description="Average final rank of a linear layer.")
    lora_alpha: float = Field(
        16.0,
        gt=0,
        description="Scaling numerator: the update is multiplied by lora_alpha / init_r.",
    )
    lora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"
    tinit: Steps = Field("auto", description="Number of initial steps without pruning.")
    tfinal: Steps = Field("auto", description="Number of final steps with fixed ranks.")
    delta_t: Positive = Field(1, description="Number of steps between prunings.")
    beta1: float = Field(0.85, gt=0, lt=1, description="EMA coefficient of the sensitivity.")
    beta2: float = Field(0.85, gt=0, lt=1, description="EMA coefficient of the uncertainty.")
    orth_reg_weight: float = Field(
        0.5, ge=0, description="Weight of the orthogonality penalty on P and Q."
    )

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaloraSpec:
        if self.target_r >= self.init_r:
            raise ValueError(
                f"method.target_r {self.target_r} is not below init_r {self.init_r}, and AdaLoRA "
                "only lowers ranks. Raise init_r, lower target_r, or use --method lora"
            )
        return self
