"""Prompt tuning and P-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import Positive, Share


class PromptSpec(MethodSpec):
    """Learned embeddings in front of the text (prompt tuning, Lester et al., 2021, section 2).

    Twenty of them, past which Lester et al. (section 3.2) gain little, beginning as embeddings of
    the vocabulary. Encoders get them behind [CLS], which stays the first token.
    """

    kind: Literal["prompt"] = "prompt"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Length of the prefix or the prompt.")
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "TEXT", "RANDOM"] = Field(
        "SAMPLE_VOCAB",
        description="What the prompt begins with: embeddings of tokens drawn from the vocabulary, "
        "those of prompt_tuning_init_text, or small random vectors.",
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="Text whose embeddings the prompt begins with."
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
    """A prompt that an encoder computes while training (P-tuning, Liu et al., 2021, section 3.2).

    What is saved is the prompt. As in `peft`, the encoder is an MLP of three layers unless an
    LSTM, the paper's, is asked for.
    """

    kind: Literal["p-tuning"] = "p-tuning"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Length of the prefix or the prompt.")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="What computes the prompt."
    )
    encoder_hidden_size: Positive | None = Field(
        None,
        description="Width of the MLP or LSTM; the default is 512 for prefix (Li & Liang) and the "
        "width of the embedding for p-tuning.",
    )
    encoder_num_layers: Positive = Field(2, description="Layers of the LSTM.")
    encoder_dropout: Share = Field(0.0, description="Dropout between the layers of the LSTM.")
