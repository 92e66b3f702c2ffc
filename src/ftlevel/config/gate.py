"""What is done with rows that would spoil a run: one field a check, its default the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ftlevel.config.section import Section

Action = Literal["stop", "drop", "fold", "warn", "ignore"]
_Any = Literal["stop", "drop", "warn", "ignore"]
_Unreadable = Literal["stop", "drop"]
_Whole = Literal["stop", "warn", "ignore"]
_Spelling = Literal["stop", "fold", "warn", "ignore"]


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
    the set as a whole cannot be dropped. Labels that are one can be made one: fold.
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
    unsupervised: Annotated[_Any, Check("no supervised token", "Give these rows an answer")] = (
        Field("drop", description="A row without a single token to learn, as after cutting.")
    )
    answer_cut: Annotated[
        _Any,
        Check("an answer that does not fit whole", "Raise --max-length (or data.doc_stride)"),
    ] = Field(
        "drop", description="An answer that is not whole in any row, being longer than it may be."
    )
    long_prompt: Annotated[
        _Any, Check("a prompt that alone is beyond the max length", "Raise --max-length")
    ] = Field("warn", description="A prompt that alone is longer than max_length; see --overlong.")
    missing_eos: Annotated[
        _Any,
        Check(
            "an answer without EOS or an end of turn among its labels",
            "The model would not learn to stop: use a --chat-template that ends each turn with a "
            "special token",
        ),
    ] = Field("stop", description="An answer that ends without a token to stop at.")
    double_bos: Annotated[
        _Any,
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
    empty_think: Annotated[
        _Any,
        Check(
            "an empty <think></think> that is learned",
            "The model would learn not to think: write the reasoning there, or use a "
            "--chat-template that adds none (qwen)",
        ),
    ] = Field(
        "warn",
        description="An empty <think></think> in what is learned, as some chat templates add it.",
    )
    turn_order: Annotated[
        _Any,
        Check(
            "a conversation that begins with the assistant or does not end with it",
            "See whether the roles are swapped",
        ),
    ] = Field(
        "warn",
        description="A conversation that begins with the assistant, or ends with another turn.",
    )
    swapped_roles: Annotated[
        _Any, Check("prompt and answer look swapped", "See whether they are")
    ] = Field(
        "warn", description="A prompt in the words of the other rows' answers, and an answer in "
        "those of their prompts.",
    )  # fmt: skip
    lost_characters: Annotated[
        _Any, Check("NUL or U+FFFD in a text", "Read the source in its own encoding")
    ] = Field("warn", description="A NUL, or a U+FFFD, which stands for a character that was lost.")
    html: Annotated[_Any, Check("HTML in a text", "Take the tags and entities out")] = Field(
        "warn", description="Tags or entities of HTML, outside of code in backticks."
    )
    special_token_text: Annotated[
        _Any,
        Check(
            "the text of a special token in a prompt or an answer",
            "It becomes that token, here and wherever the model is served: take it out",
        ),
    ] = Field(
        "warn",
        description="The text of a special token in a prompt or an answer, which becomes that "
        "token.",
    )
    answer_is_prompt: Annotated[
        _Any, Check("an answer that is the prompt", "See whether a column is mapped twice")
    ] = Field(
        "warn",
        description="An answer equal to its prompt but for case and white space, of three words "
        "or more.",
    )
    conflicting_answers: Annotated[
        _Any, Check("the prompt of an earlier row with another answer", "Keep the right one")
    ] = Field(
        "warn",
        description="A training row whose prompt is an earlier one's, with another answer or "
        "class.",
    )
    one_answer: Annotated[_Whole, Check("one answer for nearly all rows", "See --map")] = Field(
        "warn", description="One answer stands in 95 % of the rows or more."
    )
    label_space: Annotated[
        _Spelling, Check("labels that differ by white space around them", "Take it out")
    ] = Field(
        "fold", description="A label that is another but for white space around it; fold makes "
        "them one.",
    )  # fmt: skip
    label_case: Annotated[
        _Spelling, Check("labels that differ by case", "Write them alike")
    ] = Field(
        "stop", description="A label that is another but for upper and lower case; fold makes "
        "them one.",
    )  # fmt: skip
    label_typo: Annotated[
        _Spelling, Check("a rare label that looks like a frequent one misspelled", "Correct it")
    ] = Field(
        "warn", description="A rare label that is a frequent one but for a letter, or for what "
        "stands between its words; fold makes them one.",
    )  # fmt: skip
    one_class: Annotated[_Whole, Check("one class has nearly all rows", "Balance the rows")] = (
        Field("warn", description="One class has 95 % of the rows or more.")
    )
    equal_answers: Annotated[
        _Any, Check("a pair of equal answers", "There is nothing to prefer: remove them")
    ] = Field("drop", description="A pair whose preferred and rejected answers are equal.")
    contradicting_pairs: Annotated[
        _Any, Check("an earlier pair with the answers swapped", "Keep the right one")
    ] = Field("warn", description="A pair that is an earlier one with the answers swapped.")
    scores_disagree: Annotated[
        _Whole,
        Check(
            "pairs whose rejected answer has the same score or a better one",
            "See whether chosen and rejected are swapped",
        ),
    ] = Field(
        "warn", description="Pairs whose own scores say that the rejected answer is no worse."
    )
    length_bias: Annotated[
        _Whole,
        Check(
            "the preferred answer can be told by its length",
            "What is learned may be length: balance the pairs, or use --loss simpo or dpo-norm",
        ),
    ] = Field(
        "warn", description="Pairs that a judge of length alone would get right in 80 % or more."
    )
    prompt_in_answer: Annotated[
        _Whole, Check("answers that begin with their prompt", "See whether the prompt leaked")
    ] = Field("warn", description="Pairs with an answer that begins with all of the last question.")
    one_verdict: Annotated[
        _Whole, Check("all answers have one verdict", "Add answers of the other kind")
    ] = Field("stop", description="Judged answers that are all good, or all bad.")
    exact_duplicates: Annotated[_Any, Check("the same as an earlier row", "Remove them")] = Field(
        "warn", description="A training row equal to an earlier one but for case and white space."
    )
    near_duplicates: Annotated[_Any, Check("nearly the same as an earlier row", "Remove them")] = (
        Field(
            "warn",
            description="A training row that shares 80 % of its token 5-grams with an earlier one, "
            "or all but a few words.",
        )
    )
    near_leaked: Annotated[_Any, Check("nearly the same as a training row", "Remove them")] = Field(
        "warn",
        description="A validation or test row that shares all but a few words with a training row.",
    )
    leaked: Annotated[_Any, Check("also a training row", "Remove them")] = Field(
        "drop", description="A validation or test row that is also a training row."
    )


CHECKS: dict[str, Check] = {
    name: next(part for part in field.metadata if isinstance(part, Check))
    for name, field in GateConfig.model_fields.items()
}
"""Every check by the name of its field."""
