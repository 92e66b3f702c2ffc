"""Specs of methods that change every linear layer, except LoRA and AdaLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class VeraSpec(MethodSpec):
    """VeRA: W + diag(b) · B · diag(d) · A (Kopiczko et al., 2024, equation 2).

    A and B are random, frozen and shared by all layers. They are drawn from `projection_prng_key`
    and saved with the adapter, which makes it independent of the library's random numbers.
    """

    kind: Literal["vera"] = "vera"
    r: Positive = Field(256, description="Rank of the shared random matrices.")
    d_initial: float = Field(0.1, gt=0, description="Initial value of the trained vector d.")
    vera_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    projection_prng_key: int = Field(0, ge=0, description="Random seed of the shared matrices.")
    target_modules: TargetModules = "all-linear"


class OftSpec(MethodSpec):
    """OFT: W · R, with R block-diagonal and orthogonal (Qiu et al., 2023).

    R is a Cayley transform, by default by the Neumann series of OFTv2 (Qiu et al., 2025).
    """

    kind: Literal["oft"] = "oft"
    oft_block_size: int = Field(
        32, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    module_dropout: Share = Field(
        0.0, description="Dropout probability of blocks, which stay unrotated."
    )
    block_share: bool = Field(
        False, description="Whether all blocks of a layer share one rotation."
    )
    use_cayley_neumann: bool = Field(
        True,
        description="Whether to approximate the Cayley transform by a Neumann series. It "
        "is faster and nearly orthogonal.",
    )
    target_modules: TargetModules = "all-linear"


class BoftSpec(MethodSpec):
    """BOFT: R as a product of sparse rotations (Liu et al., 2024).

    One butterfly factor: PEFT has more only with its CUDA extension, and silently uses one
    otherwise.
    """

    kind: Literal["boft"] = "boft"
    boft_block_size: int = Field(
        4, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    boft_dropout: Share = Field(
        0.0, description="Dropout probability of blocks, which stay unrotated."
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
    """MiSS: W + D, from one matrix (r, out) per layer; rank at most r (Kang and Yin, 2024)."""

    kind: Literal["miss"] = "miss"
    r: Positive = Field(
        64, description="Number of repeated columns; at most the input size of a layer."
    )
    miss_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"


class ShiraSpec(MethodSpec):
    """SHiRA: W + S, S sparse with a random mask (Bhardwaj et al., 2024, section 3.1)."""

    kind: Literal["shira"] = "shira"
    r: Positive = Field(
        32, description="Rank that sets the trained weights per layer: r · (inputs + outputs)."
    )
    random_seed: int = Field(0, ge=0, description="Random seed of the sparse mask.")
    target_modules: TargetModules = "all-linear"


class HiraSpec(MethodSpec):
    """HiRA: W + W ⊙ (B · A), an update of high rank (Huang et al., 2025, section 3)."""

    kind: Literal["hira"] = "hira"
    r: Positive = Field(32, description="Rank of B · A.")
    hira_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"


class GraloraSpec(MethodSpec):
    """GraLoRA: k × k blocks, each a LoRA of rank r / k (Jung et al., 2025, section 3)."""

    kind: Literal["gralora"] = "gralora"
    r: Positive = Field(32, description="Rank of a LoRA with the same number of parameters.")
    alpha: float = Field(
        64.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    gralora_k: Positive = Field(2, description="Number of blocks per side; must divide r.")
    gralora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _blocks_share_the_rank(self) -> GraloraSpec:
        if self.r % self.gralora_k:
            raise ValueError(
                f"method.gralora_k {self.gralora_k} does not divide method.r {self.r}, which its "
                f"blocks share. Set method.r to a multiple of {self.gralora_k}"
            )
        return self


class C3aSpec(MethodSpec):
    """C³A: W + C with circulant blocks (Chen et al., 2024, section 3.3).

    C is initialized to zero, and randomly in PEFT.
    """

    kind: Literal["c3a"] = "c3a"
    block_size: Positive = Field(
        64, description="Block size; must divide every layer's input and output size."
    )
    target_modules: TargetModules = "all-linear"


class Ia3Spec(MethodSpec):
    """(IA)³: l_k · K, l_v · V and l_ff · γ(W₁x), l learned (Liu et al., 2022, section 3.3).

    A fused query-key-value layer is scaled as a whole; second feed-forward layers at their input.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: TargetModules | None = Field(
        None, description="Names of linear layers to scale; default: keys, values, feed-forward."
    )
