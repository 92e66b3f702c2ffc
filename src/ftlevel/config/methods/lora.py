"""Specs of LoRA and of other methods that change linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.constraints import Constraints, Excludes
from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.section import Names, Tokens
from ftlevel.config.sections import Positive, QuantConfig, Share
from ftlevel.errors import excludes, needs

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
_EXCLUDED_INITS = {
    "corda": "it needs statistics of the activations, which ftlevel does not collect",
    "lora_ga": "it needs gradients of the full model, which a quantized or large base cannot give",
}


PISSA = ("pissa", "pissa_niter_4", "pissa_niter_16")
BASE_MODIFYING_INITS = ("olora", *PISSA)
"""Initializations that subtract the initial update from the base weights."""


class LoraSpec(MethodSpec):
    """LoRA: W + (alpha / r) · B · A (Hu et al., 2021, § 4.1).

    Targets all linear layers of the blocks by default, as QLoRA (Dettmers et al., 2023, § 4)
    found necessary to match full fine-tuning.
    """

    constraints: ClassVar[Constraints] = (
        Excludes("use_dora", "init_lora_weights=loftq",
                 "DoRA takes its magnitudes from the weights before that start is set"),
        *[
            Excludes("target_parameters", other, "PEFT's LoRA of a bare tensor does not have it")
            for other in ("use_dora", "lora_dropout", "init_lora_weights!=default|gaussian")
        ],
    )  # fmt: skip
    kind: Literal["lora"] = "lora"
    r: Positive = Field(8, description="Rank of the update.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scaling numerator: the update is multiplied by lora_alpha / r."
    )
    lora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"
    target_parameters: Literal["experts"] | list[str] | None = Field(
        None,
        description="Parameters to adapt besides linear layers: experts (all of them), or names "
        "such as mlp.experts.down_proj.",
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
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str) and value != "experts":
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _validate_init(cls, value: object) -> object:
        if isinstance(value, str) and value in _EXCLUDED_INITS:
            raise ValueError(
                f"{_EXCLUDED_INITS[value]}. Use pissa on a float base, or default on a quantized "
                "one"
            )
        return value

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per conflict."""
        yield from super().list_conflicts()
        names_embedding = self.modules_to_save or isinstance(self.target_modules, list)
        if self.ensure_weight_tying and not names_embedding:
            required = "an embedding in modules_to_save or target_modules"
            reason = "trainable_token_indices are tied in any case"
            yield needs("ensure_weight_tying", required, reason, "Drop it.")

    def validate_quant(self, quant: QuantConfig) -> list[str]:
        """Returns an error message for DoRA on 8-bit weights, else []."""
        reason = "PEFT cannot read 8-bit weights for the magnitude"
        message = excludes("--dora", "--quant 8bit", reason, "Use --quant 4bit, or drop --dora.")
        return [message] * (quant.kind == "8bit" and self.use_dora)


class QloraSpec(LoraSpec):
    """LoRA on a quantized base model (Dettmers et al., 2023); 4 bits by default."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]  # the union is told apart by it
    default_quant: ClassVar[str] = "4bit"

    def validate_quant(self, quant: QuantConfig) -> list[str]:
        """Returns an error message if the base is not quantized, else the messages of LoRA."""
        if quant.kind != "none":
            return super().validate_quant(quant)
        fix = "Use --quant 4bit or 8bit, or --method lora."
        return [needs("--method qlora", "a quantized base (--quant is none)", fix=fix)]


Steps = Annotated[int, Field(ge=0)] | Literal["auto"]


class AdaloraSpec(MethodSpec):
    """AdaLoRA: W + P · diag(E) · Q, whose rank is pruned by importance during training.

    Zhang et al. (2023), § 3.3: ranks start at `init_r` and fall on a cubic schedule to
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
    def _validate_rank(self) -> AdaloraSpec:
        if self.target_r >= self.init_r:
            raise ValueError(
                f"method.target_r {self.target_r} is not below init_r {self.init_r}, and AdaLoRA "
                "only lowers ranks. Raise init_r, lower target_r, or use --method lora"
            )
        return self


class VeraSpec(MethodSpec):
    """VeRA: W + diag(b) · B · diag(d) · A (Kopiczko et al., 2024, equation 2).

    A and B are random, frozen and shared by all layers. They are drawn from `projection_prng_key`
    and saved with the adapter, so that loading it needs no random numbers.
    """

    kind: Literal["vera"] = "vera"
    r: Positive = Field(256, description="Rank of the shared random matrices.")
    d_initial: float = Field(0.1, gt=0, description="Initial value of the trained vector d.")
    vera_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    projection_prng_key: int = Field(0, ge=0, description="Random seed of the shared matrices.")
    target_modules: TargetModules = "all-linear"


class OftSpec(MethodSpec):
    """OFT: W · R, with R block-diagonal and orthogonal (Qiu et al., 2023).

    R is a Cayley transform, by default approximated as in OFTv2 (Qiu et al., 2025).
    """

    kind: Literal["oft"] = "oft"
    oft_block_size: int = Field(
        32, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    module_dropout: Share = Field(
        0.0, description="Dropout probability of a block; a dropped block is not rotated."
    )
    block_share: bool = Field(False, description="Whether all blocks of a layer share a rotation.")
    use_cayley_neumann: bool = Field(
        True,
        description="Whether to approximate the Cayley transform by a Neumann series. It "
        "is faster and nearly orthogonal.",
    )
    target_modules: TargetModules = "all-linear"


class BoftSpec(MethodSpec):
    """BOFT: OFT with R as a product of sparse rotations (Liu et al., 2024).

    The product has one butterfly factor. PEFT needs a CUDA extension for more, and without that
    extension silently uses one.
    """

    kind: Literal["boft"] = "boft"
    boft_block_size: int = Field(
        4, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    boft_dropout: Share = Field(
        0.0, description="Dropout probability of a block; a dropped block is not rotated."
    )
    target_modules: TargetModules = "all-linear"


class LohaSpec(MethodSpec):
    """LoHa: W + (alpha / r) · (B₁A₁ ⊙ B₂A₂), of rank up to r² (Hyeon-Woo et al., 2022)."""

    kind: Literal["loha"] = "loha"
    r: Positive = Field(8, description="Rank of each of the two factors.")
    alpha: float = Field(
        8.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    rank_dropout: Share = Field(0.0, description="Dropout probability of ranks.")
    module_dropout: Share = Field(0.0, description="Dropout probability of modules.")
    target_modules: TargetModules = "all-linear"


class LokrSpec(MethodSpec):
    """LoKr: W + (alpha / r) · C ⊗ (B · A), a Kronecker product (LyCORIS, Yeh et al., 2024)."""

    kind: Literal["lokr"] = "lokr"
    r: Positive = Field(8, description="Rank of the second factor.")
    alpha: float = Field(
        8.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    decompose_factor: int = Field(
        -1, ge=-1, description="Size of the first factor; -1 balances both factors."
    )
    rank_dropout: Share = Field(0.0, description="Dropout probability of ranks.")
    module_dropout: Share = Field(0.0, description="Dropout probability of modules.")
    target_modules: TargetModules = "all-linear"


class MissSpec(MethodSpec):
    """MiSS: W + D with D repeated from one (r, out) matrix, of rank ≤ r (Kang and Yin, 2024)."""

    kind: Literal["miss"] = "miss"
    r: Positive = Field(
        64,
        description="Number of rows of the trained matrix (r, out); at most the input size of a "
        "layer.",
    )
    miss_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"


class ShiraSpec(MethodSpec):
    """SHiRA: W + S, S sparse with a random mask (Bhardwaj et al., 2024, § 3.1)."""

    kind: Literal["shira"] = "shira"
    r: Positive = Field(
        32, description="Rank that sets the trained weights per layer: r · (inputs + outputs)."
    )
    random_seed: int = Field(0, ge=0, description="Random seed of the sparse mask.")
    target_modules: TargetModules = "all-linear"


class HiraSpec(MethodSpec):
    """HiRA: W + W ⊙ (B · A), an update of high rank (Huang et al., 2025, § 3)."""

    kind: Literal["hira"] = "hira"
    r: Positive = Field(32, description="Rank of B · A.")
    hira_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"


class GraloraSpec(MethodSpec):
    """GraLoRA: k × k blocks, each a LoRA of rank r / k (Jung et al., 2025, § 3)."""

    kind: Literal["gralora"] = "gralora"
    r: Positive = Field(32, description="Rank of a LoRA with the same number of parameters.")
    alpha: float = Field(
        64.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    gralora_k: Positive = Field(2, description="Number of blocks per side; must divide r.")
    gralora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _validate_blocks(self) -> GraloraSpec:
        if self.r % self.gralora_k:
            raise ValueError(
                f"method.gralora_k {self.gralora_k} does not divide method.r {self.r}, which its "
                f"blocks share. Set method.r to a multiple of {self.gralora_k}"
            )
        return self


class C3aSpec(MethodSpec):
    """C³A: W + C with circulant blocks (Chen et al., 2024, § 3.3).

    C is initialized to zero; PEFT initializes it randomly.
    """

    kind: Literal["c3a"] = "c3a"
    block_size: Positive = Field(
        64, description="Block size; must divide every layer's input and output size."
    )
    target_modules: TargetModules = "all-linear"


class Ia3Spec(MethodSpec):
    """(IA)³: l_k · K, l_v · V and l_ff · γ(W₁x), l learned (Liu et al., 2022, § 3.3).

    The second feed-forward layer is scaled at its input, a fused QKV layer at all its outputs.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: TargetModules | None = Field(
        None, description="Names of linear layers to scale; default: keys, values, feed-forward."
    )
