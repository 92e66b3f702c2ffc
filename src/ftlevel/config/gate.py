"""What is done with rows that would spoil a run: one field a check, its default the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.section import Section

Action = Literal["stop", "drop", "warn", "ignore"]
_Unreadable = Literal["stop", "drop"]
_Whole = Literal["stop", "warn", "ignore"]


class GateConfig(Section):
    """What happens to rows in which something is wrong: stop, drop (and say), warn or ignore.

    A row that cannot be learned from at all can only stop a run or be dropped; what is wrong with
    the set as a whole cannot be dropped.
    """

    null_content: _Unreadable = Field("stop", description="A text, turn or label that is null.")
    empty_text: _Unreadable = Field("stop", description="A text or turn with nothing in it.")
    unknown_role: _Unreadable = Field(
        "stop", description="A turn of a role other than system, user, assistant and tool."
    )
    unknown_label: _Unreadable = Field(
        "stop", description="A label that is no class: -1, -100, or one that training never sees."
    )
    unsupervised: Action = Field(
        "drop", description="A row without a single token to learn, as after cutting."
    )
    answer_cut: Action = Field(
        "drop", description="An answer that is not whole in any row, being longer than it may be."
    )
    long_prompt: Action = Field(
        "warn", description="A prompt that alone is longer than max_length; see --overlong."
    )
    missing_eos: Action = Field(
        "stop", description="An answer that ends without a token to stop at."
    )
    double_bos: Action = Field("stop", description="A row that begins with two BOS tokens.")
    token_range: _Unreadable = Field(
        "stop", description="A token id beyond the model's embedding: another model's tokenizer."
    )
    one_class: _Whole = Field("warn", description="One class has 95 % of the rows or more.")
    exact_duplicates: Action = Field(
        "warn", description="A training row equal to an earlier one but for case and white space."
    )
    near_duplicates: Action = Field(
        "warn",
        description="A training row that shares 80 % of its token 5-grams with an earlier one.",
    )
    leaked: Action = Field(
        "drop", description="A validation or test row that is also a training row."
    )
