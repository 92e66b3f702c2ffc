"""Specs of bottleneck adapters, prefix, prompt and P-tuning, LN-tuning and full fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ftlevel.config.constraints import Constraints, Needs
from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, QuantConfig, Share
from ftlevel.errors import excludes

REDUCTION_FACTOR = 16.0
PARALLEL_SCALING = 4.0

Placement = Literal["houlsby", "pfeiffer", "seq_bn", "parallel", "par_bn", "adapter_plus"]
ON_RESIDUAL = ("seq_bn", "par_bn", "adapter_plus")
"""Placements that read a feed-forward layer's residual; they exclude `target_modules`."""


def default_scaling(placement: str) -> float | str:
    """Returns the default output scale: a number, or "channel" for a learned one per channel."""
    if placement == "adapter_plus":
        return "channel"  # Steitz & Roth, 2024, § 3.3
    return PARALLEL_SCALING if placement in ("parallel", "par_bn") else 1.0


class AdapterSpec(MethodSpec):
    """Bottleneck adapters: h + s · up(f(down(x))), parallel to or after the sub-layers of a block.

    Placements: `houlsby`, Houlsby et al. (2019), § 2.1; `seq_bn` and `pfeiffer`, Pfeiffer et
    al. (2021), appendix A.1, whose reduction factor of 16 is the default; `par_bn` and `parallel`,
    He et al. (2022), sections 3.3 and 4.6; `adapter_plus`, Steitz & Roth (2024).
    """

    kind: Literal["adapter"] = "adapter"
    all_linear: ClassVar[bool] = False
    placement: Placement = Field(
        "houlsby",
        description="Position of the adapters in each block. houlsby: after attention and after"
        " the feed-forward; seq_bn: after the feed-forward, on its sum with the "
        "residual (AdapterHub's pfeiffer); pfeiffer: after the feed-forward, on its"
        " output alone; par_bn: parallel to it, on the residual; parallel: parallel"
        " to it, on its normed input; adapter_plus: after the block, with one scale per channel.",
    )
    reduction_factor: float | None = Field(
        None, ge=1, description="Hidden size divided by the bottleneck width; default: 16."
    )
    bottleneck_dim: Positive | None = Field(
        None, description="Width of the bottleneck, instead of reduction_factor."
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh", "leaky_relu"] = Field(
        "relu", description="Activation between the two projections."
    )
    adapter_dropout: Share = Field(
        0.0, description="Dropout probability of the bottleneck's activations."
    )
    scaling: Annotated[float, Field(gt=0)] | Literal["learned", "channel"] | None = Field(
        None,
        description="Scale of the adapter's output: a number, learned, or one per channel. "
        "Default: 4 for parallel and par_bn, channel for adapter_plus, else 1.",
    )
    target_modules: TargetModules | None = Field(
        None,
        description="Linear layers to add adapters after, instead of the default positions. A "
        "parallel adapter gets the layer's own input if the layer does not end a feed-forward.",
    )

    @model_validator(mode="after")
    def _validate_width(self) -> AdapterSpec:
        if self.reduction_factor is not None and self.bottleneck_dim is not None:
            raise ValueError(
                f"reduction_factor {self.reduction_factor:g} and bottleneck_dim "
                f"{self.bottleneck_dim} both set the width of the bottleneck; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _validate_positions(self) -> AdapterSpec:
        if self.target_modules is not None and self.placement in ON_RESIDUAL:
            raise ValueError(
                f"placement {self.placement} reads the residual of a feed-forward, which is known "
                "of a family's own positions only; drop target_modules, or use placement houlsby, "
                "pfeiffer or parallel"
            )
        return self


HiddenSize = Annotated[
    Positive | None,
    Field(
        description="Hidden size of the prefix MLP (default: 512) or the P-tuning encoder. The "
        "P-tuning encoder uses the embedding size by default."
    ),
]


class PrefixSpec(MethodSpec):
    """Prefix tuning: learned keys and values in every attention (Li & Liang, 2021, § 4.2).

    The default length of 20 suits classification (P-tuning v2, Liu et al., 2022, § 4.2); Li &
    Liang (§ 7.2) use 10 for table-to-text and 200 for summarization.
    """

    kind: Literal["prefix"] = "prefix"
    all_linear: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    prefix_projection: bool = Field(
        False,
        description="Whether to compute the prefix with an MLP while training. Only the prefix "
        "is saved.",
    )
    encoder_hidden_size: HiddenSize = None


class PromptSpec(MethodSpec):
    """Prompt tuning: learned embeddings before the text (Lester et al., 2021, § 2).

    More than 20 tokens gain little (§ 3.2). In encoders, the learned embeddings follow [CLS].
    """

    constraints: ClassVar[Constraints] = (
        Needs("prompt_tuning_init=TEXT", "prompt_tuning_init_text …"),
        Needs("prompt_tuning_init_text", "prompt_tuning_init=TEXT"),
    )
    kind: Literal["prompt"] = "prompt"
    all_linear: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "TEXT", "RANDOM"] = Field(
        "SAMPLE_VOCAB",
        description="Initialization of the prompt. Embeddings of random vocabulary tokens, of "
        "prompt_tuning_init_text, or small random vectors.",
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="Text whose embeddings initialize the prompt."
    )


class PTuningSpec(MethodSpec):
    """P-tuning: a prompt computed by an encoder during training (Liu et al., 2021, § 3.2).

    As in `peft`, the encoder is an MLP by default; the paper uses an LSTM.
    """

    kind: Literal["p-tuning"] = "p-tuning"
    all_linear: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="Type of the prompt encoder."
    )
    encoder_hidden_size: HiddenSize = None
    encoder_num_layers: Positive = Field(2, description="Number of LSTM layers.")
    encoder_dropout: Share = Field(0.0, description="Dropout probability between LSTM layers.")


class FullSpec(MethodSpec):
    """Full fine-tuning: train every weight of the model, without an adapter."""

    kind: Literal["full"] = "full"
    all_linear: ClassVar[bool] = False
    freeze_base: bool = Field(
        False,
        description="Whether to train only the new head (linear probing); for tasks with a head.",
    )

    def validate_quant(self, quant: QuantConfig) -> list[str]:
        """Returns an error message if the base is quantized: such weights cannot be trained."""
        reason = f"{quant.kind[0]}-bit weights receive no gradients"
        fix = "Use --method qlora, or drop --quant."
        message = excludes(f"--quant {quant.kind}", "--method full", reason, fix)
        return [message] * (quant.kind != "none")


class LnTuningSpec(MethodSpec):
    """LN-tuning: train the weights and biases of all norm layers (Zhao et al., 2024)."""

    kind: Literal["ln-tuning"] = "ln-tuning"
    all_linear: ClassVar[bool] = False
