"""Actions for problems in the data: one field per check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model

from ftlevel.config.section import Section
from ftlevel.extensions import load_all

Action = Literal["stop", "drop", "fold", "warn", "ignore"]
OnRow = Literal["stop", "drop", "warn", "ignore"]
"""Action of a check of single rows."""
_Unreadable = Literal["stop", "drop"]
OnData = Literal["stop", "warn", "ignore"]
"""Action of a check of the whole dataset."""
_Spelling = Literal["stop", "fold", "warn", "ignore"]


@dataclass(frozen=True)
class Check:
    """Texts on a data check: its `title` in reports, and `remedy`, what to do (or "")."""

    title: str
    remedy: str = ""


class GateConfig(Section):
    """Action per data problem: stop; drop the row and report it; warn; ignore; or fold.

    `fold` replaces variants of a label by one. Unusable rows can only stop the run or be dropped;
    problems of the whole dataset cannot be dropped.
    """

    null_content: Annotated[_Unreadable, Check("null content")] = Field(
        "stop", description="Text, turn or label that is null."
    )
    empty_text: Annotated[_Unreadable, Check("empty text")] = Field(
        "stop", description="Empty text or turn."
    )
    unknown_role: Annotated[_Unreadable, Check("unknown role")] = Field(
        "stop", description="Turn with a role other than system, user, assistant or tool."
    )
    unknown_label: Annotated[_Unreadable, Check("a label that is not a class")] = Field(
        "stop", description="Label that is not a class: -1, -100, or absent from the training data."
    )
    unsupervised: Annotated[OnRow, Check("no supervised token", "Give these rows an answer")] = (
        Field("drop", description="Row without a supervised token, for example after truncation.")
    )
    answer_cut: Annotated[
        OnRow,
        Check("an answer that does not fit whole", "Raise --max-length (or data.doc_stride)"),
    ] = Field("drop", description="Answer that is longer than the maximum length.")
    long_prompt: Annotated[
        OnRow, Check("a prompt that alone exceeds the max length", "Raise --max-length")
    ] = Field("warn", description="Prompt longer than max_length by itself; see --overlong.")
    missing_eos: Annotated[
        OnRow,
        Check(
            "an answer without EOS or an end of turn among its labels",
            "The model would not learn to stop: use a --chat-template that ends each turn with a "
            "special token",
        ),
    ] = Field("stop", description="Answer without EOS or end-of-turn token among its labels.")
    double_bos: Annotated[
        OnRow,
        Check(
            "two BOS tokens at the beginning",
            "Remove the BOS token from the texts or from the chat template",
        ),
    ] = Field("stop", description="Row that begins with two BOS tokens.")
    token_range: Annotated[
        _Unreadable,
        Check(
            "a token id beyond the model's embedding",
            "The tokenizer is not this model's: use its own",
        ),
    ] = Field(
        "stop", description="Token id beyond the embedding, as from another model's tokenizer."
    )
    empty_think: Annotated[
        OnRow,
        Check(
            "a supervised empty <think></think>",
            "The model would learn not to reason: add the reasoning, or use a --chat-template "
            "without it (qwen)",
        ),
    ] = Field(
        "warn", description="Empty <think></think> among the labels, as from some chat templates."
    )
    turn_order: Annotated[
        OnRow,
        Check(
            "a conversation that begins with the assistant or does not end with it",
            "Check whether the roles are swapped",
        ),
    ] = Field(
        "warn", description="Conversation that begins with the assistant, or does not end with it."
    )
    swapped_roles: Annotated[
        OnRow, Check("prompt and answer look swapped", "Check the column mapping")
    ] = Field(
        "warn",
        description="Prompt and answer that look swapped, judging by the words of other rows.",
    )
    lost_characters: Annotated[
        OnRow, Check("NUL or U+FFFD in a text", "Read the source in its own encoding")
    ] = Field("warn", description="NUL or U+FFFD (replacement character) in a text.")
    html: Annotated[OnRow, Check("HTML in a text", "Remove the HTML tags and entities")] = Field(
        "warn", description="HTML tags or entities outside of code in backticks."
    )
    special_token_text: Annotated[
        OnRow,
        Check(
            "the text of a special token in a prompt or an answer",
            "It is encoded as a special token, in training and in serving: remove it",
        ),
    ] = Field(
        "warn",
        description="Special token written as text in a prompt or answer. The tokenizer turns "
        "it into that token.",
    )
    answer_is_prompt: Annotated[
        OnRow, Check("an answer that is the prompt", "Check whether a column is mapped twice")
    ] = Field(
        "warn",
        description="Answer equal to its prompt, up to case and whitespace. Only answers of "
        "three words or more.",
    )
    conflicting_answers: Annotated[
        OnRow, Check("an earlier row's prompt with another answer", "Keep the right one")
    ] = Field(
        "warn",
        description="Training row with an earlier row's prompt, but another answer or class.",
    )
    one_answer: Annotated[OnData, Check("one answer for nearly all rows", "See --map")] = Field(
        "warn", description="Same answer in 95 % of the rows or more."
    )
    label_space: Annotated[
        _Spelling, Check("labels that differ by surrounding white space", "Remove it")
    ] = Field(
        "fold", description="Labels that differ only by surrounding whitespace; fold merges them."
    )
    label_case: Annotated[_Spelling, Check("labels that differ by case", "Write them alike")] = (
        Field("stop", description="Labels that differ only by case; fold merges them.")
    )
    label_typo: Annotated[
        _Spelling, Check("a rare label that looks like a misspelled frequent one", "Correct it")
    ] = Field(
        "warn",
        description="Rare label that looks like a misspelled frequent one; fold merges them. They "
        "differ by one letter, or by the separators between words.",
    )
    one_class: Annotated[OnData, Check("one class has nearly all rows", "Balance the rows")] = (
        Field("warn", description="One class in 95 % of the rows or more.")
    )
    contradicting_labels: Annotated[
        OnData,
        Check("documents that are relevant and irrelevant to one query", "Keep the right label"),
    ] = Field(
        "warn",
        description="Document that is relevant to its query in one row and irrelevant in another.",
    )
    document_variants: Annotated[
        OnData, Check("documents that differ by case or white space", "Write them alike")
    ] = Field(
        "warn",
        description="Documents equal up to case and whitespace; one is a false negative of the "
        "other.",
    )
    missing_positives: Annotated[
        OnData,
        Check(
            "relevant documents that are not in the corpus",
            "Name the corpus that has them with --corpus",
        ),
    ] = Field("stop", description="Validation query with a relevant document outside of --corpus.")
    trained_documents: Annotated[
        OnData,
        Check(
            "a positive that is also a document of the validation corpus",
            "Check whether documents are in two splits",
        ),
    ] = Field(
        "warn", description="Training row whose positive is in the corpus of validation queries."
    )
    exact_duplicates: Annotated[OnRow, Check("the same as an earlier row", "Remove them")] = Field(
        "warn", description="Training row equal to an earlier one, up to case and whitespace."
    )
    near_duplicates: Annotated[OnRow, Check("nearly the same as an earlier row", "Remove them")] = (
        Field(
            "warn",
            description="Training row nearly equal to an earlier one: 80 % of the words of prompt "
            "and answer are in both.",
        )
    )
    near_leaked: Annotated[OnRow, Check("nearly the same as a training row", "Remove them")] = (
        Field("warn", description="Validation or test row nearly equal to a training row.")
    )
    leaked: Annotated[OnRow, Check("also a training row", "Remove them")] = Field(
        "drop", description="Validation or test row that is also a training row."
    )


if not TYPE_CHECKING and (_added := load_all("data_checks")):
    GateConfig = create_model(
        "GateConfig", __base__=tuple(_added), __module__=__name__, __doc__=GateConfig.__doc__
    )

CHECKS: dict[str, Check] = {
    name: next(part for part in field.metadata if isinstance(part, Check))
    for name, field in GateConfig.model_fields.items()
}
"""Checks by field name."""
