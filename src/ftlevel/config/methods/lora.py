"""LoRA and QLoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.preference import Names, Tokens
from ftlevel.config.sections import Positive, QuantConfig, Share

LoraInit = Literal[
    "default",
    "gaussian",
    "orthogonal",
    "olora",
    "pissa",
    "pissa_niter_4",
    "pissa_niter_16",
    "loftq",
    "eva",
]
_REFUSED_INITS = {
    "corda": "it needs statistics of the activations, which ftlevel does not collect",
    "lora_ga": "it needs gradients of the full model, which a quantized or large base cannot give",
}


PISSA = ("pissa", "pissa_niter_4", "pissa_niter_16")
BASE_MODIFYING_INITS = ("olora", *PISSA)
"""Initializations that subtract the initial update from the base weights."""


class LoraSpec(MethodSpec):
    """LoRA: W + (alpha / r) · B · A (Hu et al., 2021, section 4.1).

    Targets all linear layers of the blocks by default, as QLoRA (Dettmers et al., 2023, section 4)
    found necessary to match full fine-tuning.
    """

    kind: Literal["lora"] = "lora"
    r: Positive = Field(8, description="Rank of the update.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scaling numerator: the update is multiplied by lora_alpha / r."
    )
    lora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"
    target_parameters: Literal["experts"] | list[str] | None = Field(
        None,
        description="Parameters to adapt besides linear layers: experts, or names. Example: "
        "mlp.experts.down_proj.",
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Indices of the layers to adapt, from 0; default: all."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Rank by module name or regular expression."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="lora_alpha by module name or regular expression."
    )
    init_lora_weights: LoraInit = Field(
        "default",
        description="Initialization of A and B; default sets B to 0. gaussian, orthogonal, "
        "olora, pissa, pissa_niter_4 or pissa_niter_16 (fast PiSSA), loftq (for a "
        "4-bit base), or eva.",
    )
    use_rslora: bool = Field(
        False, description="Whether to scale by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski, 2023)."
    )
    use_dora: bool = Field(
        False,
        description="Whether to use DoRA (Liu et al., 2024). It trains direction and "
        "magnitude separately.",
    )
    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Learning-rate ratio of B to A (LoRA+, Hayou et al., 2024)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Bias terms of the base model to train."
    )
    modules_to_save: Names = Field(
        default_factory=list,
        description="Modules to train in full and save, e.g. embed_tokens,lm_head. A new head "
        "is always among them.",
    )
    trainable_token_indices: Tokens = Field(
        default_factory=list, description="Tokens whose embeddings are trained, by id or text."
    )
    ensure_weight_tying: bool = Field(
        False,
        description="Whether to train a tied output layer together with its embedding. Applies "
        "to embeddings in modules_to_save or target_modules.",
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
                (
                    f"init_lora_weights {self.init_lora_weights}",
                    self.init_lora_weights not in ("default", "gaussian"),
                ),
            ):
                if given:
                    raise ValueError(
                        f"target_parameters cannot be used with {name}: PEFT's LoRA of a bare "
                        "tensor does not have it. Drop one of them"
                    )
        return self

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Reject DoRA on 8-bit weights."""
        if quant.kind != "8bit" or not self.use_dora:
            return []
        return [
            "use_dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the "
            "magnitude. Use --quant 4bit, or drop use_dora."
        ]


class QloraSpec(LoraSpec):
    """LoRA on a quantized base model (Dettmers et al., 2023); 4 bits by default."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]  # the union is told apart by it
    wants_quant: ClassVar[str] = "4bit"

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Reject a base model that is not quantized."""
        if quant.kind != "none":
            return super().quant_problems(quant)
        return [
            "--method qlora needs a quantized base, and --quant is none. "
            "Use --quant 4bit or 8bit, or --method lora."
        ]
