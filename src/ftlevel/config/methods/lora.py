"""LoRA and QLoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.preference import Names, Tokens
from ftlevel.config.sections import Positive, QuantConfig, Share

LoraInit = Literal[
    "default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16",
    "loftq", "eva",
]  # fmt: skip
_REFUSED_INITS = {
    "corda": "it needs statistics of the activations, which ftlevel does not collect",
    "lora_ga": "it needs gradients of the full model, which a quantized or large base cannot give",
}


PISSA = ("pissa", "pissa_niter_4", "pissa_niter_16")
INSIDE_BASE = ("olora", *PISSA)
"""Starts that are taken out of the base's weights."""


class LoraSpec(MethodSpec):
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
    target_parameters: Literal["experts"] | list[str] | None = Field(
        None,
        description="Tensors that get an update beside the linears: experts, or names of "
        "parameters such as mlp.experts.down_proj.",
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Adapt only these layers, counted from 0; the default is all."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Module name or regular expression: its own rank."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Module name or regular expression: its own lora_alpha."
    )
    init_lora_weights: LoraInit = Field(
        "default",
        description="How A and B begin: default (B is 0), gaussian, orthogonal, olora, pissa, "
        "pissa_niter_4 or _16 (its fast form), loftq (what a 4-bit base lost), or eva.",
    )
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski, 2023)."
    )
    use_dora: bool = Field(
        False, description="Train direction and magnitude apart (DoRA, Liu et al., 2024)."
    )
    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Learn B this many times as fast as A (LoRA+, Hayou et al., 2024)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which bias terms of the base are trained too."
    )
    modules_to_save: Names = Field(
        default_factory=list,
        description="Modules beside a new head that are trained in full and saved with the "
        "adapter, such as embed_tokens and lm_head.",
    )
    trainable_token_indices: Tokens = Field(
        default_factory=list,
        description="Tokens whose rows of the embedding are trained, by id or by text.",
    )
    ensure_weight_tying: bool = Field(
        False,
        description="Train the output layer with the embedding whose weights it shares, where that "
        "is in modules_to_save or target_modules.",
    )

    @field_validator("layers_to_transform", "target_parameters", mode="before")
    @classmethod
    def _commas_separate(cls, value: object) -> object:
        if isinstance(value, str) and value != "experts":
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _init_is_offered(cls, value: object) -> object:
        if isinstance(value, str) and value in _REFUSED_INITS:
            raise ValueError(
                f"{_REFUSED_INITS[value]}. Use pissa on a float base, or default on a quantized one"
            )
        return value

    @model_validator(mode="after")
    def _options_agree(self) -> LoraSpec:
        if self.ensure_weight_tying and not (
            self.modules_to_save or isinstance(self.target_modules, list)
        ):
            raise ValueError(
                "ensure_weight_tying is of an embedding in modules_to_save or target_modules, and "
                "there is none; trainable_token_indices are tied in any case. Drop it"
            )
        if self.use_dora and self.init_lora_weights == "loftq":
            raise ValueError(
                "use_dora cannot be used with init_lora_weights loftq: DoRA takes its magnitudes "
                "from the weights before that start is set. Drop one of them"
            )
        if self.target_parameters is not None:
            for name, given in (
                ("use_dora", self.use_dora),
                ("lora_dropout", self.lora_dropout > 0),
                (f"init_lora_weights {self.init_lora_weights}",
                 self.init_lora_weights not in ("default", "gaussian")),
            ):  # fmt: skip
                if given:
                    raise ValueError(
                        f"target_parameters cannot be used with {name}: PEFT's LoRA of a bare "
                        "tensor does not have it. Drop one of them"
                    )
        return self

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Refuse DoRA on 8-bit weights."""
        if quant.kind != "8bit" or not self.use_dora:
            return []
        return [
            "use_dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the "
            "magnitude. Use --quant 4bit, or drop use_dora."
        ]


class QloraSpec(LoraSpec):
    """LoRA on a quantized base (Dettmers et al., 2023): 4 bits unless `quant` says 8."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]  # the union is told apart by it
    wants_quant: ClassVar[str] = "4bit"

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Refuse a base that is not quantized, too."""
        if quant.kind != "none":
            return super().quant_problems(quant)
        return [
            "--method qlora needs a quantized base, and --quant is none. "
            "Use --quant 4bit or 8bit, or --method lora."
        ]
