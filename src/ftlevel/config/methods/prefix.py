"""Prefix tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import Positive


class PrefixSpec(MethodSpec):
    """Learned keys and values in front of every attention (Li & Liang, 2021, section 4.2).

    An encoder-decoder gets them in the encoder, in the decoder and in its cross-attention. Twenty
    is where P-tuning v2 (Liu et al., 2022, section 4.2) finds simple classification to be
    best served; Li & Liang (section 7.2) find 10 enough to write text from tables and 200 for
    summaries.
    """

    kind: Literal["prefix"] = "prefix"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Length of the prefix or the prompt.")
    prefix_projection: bool = Field(
        False,
        description="Compute the prefix by an MLP while training; what is saved is the prefix.",
    )
    encoder_hidden_size: Positive | None = Field(
        None,
        description="Width of the MLP or LSTM; the default is 512 for prefix (Li & Liang) and the "
        "width of the embedding for p-tuning.",
    )
