"""LoRA and QLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import TargetModules
from ftlevel.config.sections import Positive, Section, Share


class LoraSpec(Section):
    """LoRA: W + (alpha / r) · B · A (Hu et al., 2021, section 4.1).

    The default targets every linear of the blocks, which QLoRA (Dettmers et al., 2023, section 4)
    found to be needed to match full fine-tuning.
    """

    kind: Literal["lora"] = "lora"
    r: Positive = Field(8, description="Rank of the update.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of the update: it is multiplied by lora_alpha / r."
    )
    lora_dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: TargetModules = "all-linear"
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski, 2023)."
    )
    use_dora: bool = Field(
        False, description="Train direction and magnitude apart (DoRA, Liu et al., 2024)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which bias terms of the base are trained too."
    )


class QloraSpec(LoraSpec):
    """LoRA on a quantized base (Dettmers et al., 2023): 4 bits unless `quant` says 8."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]  # the union is told apart by it
