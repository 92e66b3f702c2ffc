"""What is done with rows that would spoil a run: one field a check, its default the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ftlevel.config.section import Section

Action = Literal["stop", "drop", "warn", "ignore"]
_Unreadable = Literal["stop", "drop"]
_Whole = Literal["stop", "warn", "ignore"]


@dataclass(frozen=True)
class Check:
    """How a check is spoken of.

    Attributes:
        title: what is wrong, in a few words.
        remedy: what to do, as the beginning of a sentence; empty where there is more than one way.
    """

    title: str
    remedy: str = ""


class GateConfig(Section):
    """What happens to rows in which something is wrong: stop, drop (and say), warn or ignore.

    A row that cannot be learned from at all can only stop a run or be dropped; what is wrong with
    the set as a whole cannot be dropped.
    """

    null_content: Annotated[_Unreadable, Check("null content")] = Field(
        "stop", description="A text, turn or label that is null."
    )
    empty_text: Annotated[_Unreadable, Check("empty text")] = Field(
        "stop", description="A text or turn with nothing in it."
    )
    unknown_role: Annotated[_Unreadable, Check("unknown role")] = Field(
        "stop", description="A turn of a role other than system, user, assistant and tool."
    )
    unknown_label: Annotated[_Unreadable, Check("a label that is no class")] = Field(
        "stop", description="A label that is no class: -1, -100, or one that training never sees."
    )
    unsupervised: Annotated[Action, Check("no supervised token", "Give these rows an answer")] = (
        Field("drop", description="A row without a single token to learn, as after cutting.")
    )
    answer_cut: Annotated[
        Action,
        Check("an answer that does not fit whole", "Raise --max-length (or data.doc_stride)"),
    ] = Field(
        "drop", description="An answer that is not whole in any row, being longer than it may be."
    )
    long_prompt: Annotated[
        Action, Check("a prompt that alone is beyond the max length", "Raise --max-length")
    ] = Field("warn", description="A prompt that alone is longer than max_length; see --overlong.")
    missing_eos: Annotated[
        Action,
        Check(
            "an answer without EOS or an end of turn among its labels",
            "The model would not learn to stop: use a --chat-template that ends each turn with a "
            "special token",
        ),
    ] = Field("stop", description="An answer that ends without a token to stop at.")
    double_bos: Annotated[
        Action,
        Check(
            "two BOS tokens at the beginning",
            "Take the BOS out of the texts or of the chat template",
        ),
    ] = Field("stop", description="A row that begins with two BOS tokens.")
    token_range: Annotated[
        _Unreadable,
        Check(
            "a token id beyond the model's embedding",
            "The tokenizer is not this model's: use its own",
        ),
    ] = Field(
        "stop", description="A token id beyond the model's embedding: another model's tokenizer."
    )
    one_class: Annotated[_Whole, Check("one class has nearly all rows", "Balance the rows")] = (
        Field("warn", description="One class has 95 % of the rows or more.")
    )
    exact_duplicates: Annotated[Action, Check("the same as an earlier row", "Remove them")] = Field(
        "warn", description="A training row equal to an earlier one but for case and white space."
    )
    near_duplicates: Annotated[
        Action, Check("nearly the same as an earlier row", "Remove them")
    ] = Field(
        "warn",
        description="A training row that shares 80 % of its token 5-grams with an earlier one.",
    )
    leaked: Annotated[Action, Check("also a training row", "Remove them")] = Field(
        "drop", description="A validation or test row that is also a training row."
    )


CHECKS: dict[str, Check] = {
    name: next(part for part in field.metadata if isinstance(part, Check))
    for name, field in GateConfig.model_fields.items()
}
"""Every check by the name of its field."""
