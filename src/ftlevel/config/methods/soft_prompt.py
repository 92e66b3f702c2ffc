"""Prompt tuning and P-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import Positive, Share


class PromptSpec(MethodSpec):
    """Prompt tuning: learned embeddings before the text (Lester et al., 2021, section 2).

    More than 20 tokens gain little (section 3.2). Encoders get them after [CLS].
    """

    kind: Literal["prompt"] = "prompt"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "TEXT", "RANDOM"] = Field(
        "SAMPLE_VOCAB",
        description="Initialization of the prompt. Embeddings of random vocabulary tokens, of "
        "prompt_tuning_init_text, or small random vectors.",
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="Text whose embeddings initialize the prompt."
    )

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> PromptSpec:
        wanted, given = self.prompt_tuning_init == "TEXT", self.prompt_tuning_init_text is not None
        if wanted and not given:
            raise ValueError(
                "prompt_tuning_init TEXT needs the text. Add prompt_tuning_init_text, or use "
                "SAMPLE_VOCAB."
            )
        if given and not wanted:
            raise ValueError(
                f"prompt_tuning_init_text is used by prompt_tuning_init TEXT, which is "
                f"{self.prompt_tuning_init}. Set it to TEXT, or drop the text."
            )
        return self


class PTuningSpec(MethodSpec):
    """P-tuning: a prompt computed by an encoder during training (Liu et al., 2021, section 3.2).

    As in `peft`, the encoder is an MLP by default; the paper uses an LSTM.
    """

    kind: Literal["p-tuning"] = "p-tuning"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="Type of the prompt encoder."
    )
    encoder_hidden_size: Positive | None = Field(
        None,
        description="Hidden size of the prefix MLP (default: 512) or the P-tuning encoder. The "
        "P-tuning encoder uses the embedding size by default.",
    )
    encoder_num_layers: Positive = Field(2, description="Number of LSTM layers.")
    encoder_dropout: Share = Field(0.0, description="Dropout probability between LSTM layers.")
