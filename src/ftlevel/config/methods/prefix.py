"""Prefix tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import Positive


class PrefixSpec(MethodSpec):
    """Prefix tuning: learned keys and values in every attention (Li & Liang, 2021, section 4.2).

    The default length of 20 suits classification (P-tuning v2, Liu et al., 2022, section 4.2); Li &
    Liang (section 7.2) use 10 for table-to-text and 200 for summarization.
    """

    kind: Literal["prefix"] = "prefix"
    targets_linears: ClassVar[bool] = False
    num_virtual_tokens: Positive = Field(20, description="Number of virtual tokens.")
    prefix_projection: bool = Field(
        False,
        description="Whether to compute the prefix with an MLP while training. Only the prefix "
        "is saved.",
    )
    encoder_hidden_size: Positive | None = Field(
        None,
        description="Hidden size of the prefix MLP (default: 512) or the P-tuning encoder. The "
        "P-tuning encoder uses the embedding size by default.",
    )
