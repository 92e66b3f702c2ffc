"""Column layouts of preference data, and the examples built from them.

A prompt has its own column, or both answers begin with it. Then it is split off by turns, or at the
last "Assistant:" of HH-RLHF texts, never by common characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.formats.detect import FormatSpec, RoleValues
from ftlevel.data.formats.examples import ExampleContent, get_tools, prompt_text, with_system
from ftlevel.data.formats.turns import Message, UnusableRowError, check_text, parse_turns
from ftlevel.data.sources.table import json_type_name, to_float
from ftlevel.tasks.text import CHAT, TURN_KEYS

Turns = tuple[Message, ...]
_HH = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class PairExample:
    """Two answers to one prompt; each has several turns if the conversations diverge early.

    `margin` is 0 and `scores` are empty if the data has none.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    row: int
    tools: tuple[dict[str, Any], ...]
    margin: float
    scores: tuple[float, ...]

    @property
    def key_text(self) -> str:
        return "\0".join(map(join_turns, (self.prompt, self.chosen, self.rejected)))

    @property
    def content(self) -> ExampleContent:
        """Texts for duplicate checks: question, preferred answer; all other texts as context."""
        chosen = join_turns(self.chosen)
        return _content(self.prompt, chosen, join_turns(self.rejected), chosen, self.tools)


@dataclass(frozen=True)
class LabeledCompletion:
    """One answer labeled as desirable or not; `row` is its index in the table."""

    prompt: Turns
    answer: Turns
    desirable: bool
    row: int
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key_text(self) -> str:
        return "\0".join((join_turns(self.prompt), join_turns(self.answer), str(self.desirable)))

    @property
    def content(self) -> ExampleContent:
        answer = join_turns(self.answer)
        return _content(self.prompt, answer, answer, str(self.desirable), self.tools)


def _content(prompt: Turns, target: str, other: str, last: str, tools: object) -> ExampleContent:
    question = "\n".join(turn.content for turn in prompt if turn.role in ("user", "tool"))
    context = "\0".join((join_turns(prompt), other, str(tools or "")))
    return ExampleContent(question, target, context, last, is_generated=True)


def join_turns(turns: Sequence[Message]) -> str:
    """Returns the contents of `turns` as one text, with role names if there are several."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def create_pair(values: RoleValues) -> PairExample:
    """Create a pair example from a row in any of the supported column layouts."""
    if "ranked" in values:
        better, worse, scores = _best_and_worst(values)
    elif "output" in values:
        (better, worse), scores = _two(values), ()
    else:
        better, worse = values.get("chosen"), values.get("rejected")
        scores = tuple(
            _number(values, role) for role in ("score_chosen", "score_rejected") if role in values
        )
    prompt = _prompt(values)
    if "chosen" not in values and "rejected" in values:  # the last turn is the preferred answer
        if not prompt or prompt[-1].role != "assistant":
            raise UnusableRowError("does not end with an answer of the assistant", "unsupervised")
        prompt, chosen = prompt[:-1], prompt[-1:]
        return _pair(values, prompt, chosen, _answer(values, "rejected", worse), scores)
    chosen, rejected = _answer(values, "chosen", better), _answer(values, "rejected", worse)
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if common:
        shared = tuple(chosen[:common])
        repeats = shared[-len(prompt) :] == prompt or _same(shared, prompt)
        prompt = max(prompt, shared, key=len) if repeats else (*prompt, *shared)
    chosen, rejected = chosen[common:], rejected[common:]
    return _pair(values, prompt, chosen, rejected, scores)


def _pair(
    values: RoleValues, prompt: Turns, chosen: Turns, rejected: Turns, scores: tuple[float, ...]
) -> PairExample:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role != "assistant":
            raise UnusableRowError(
                f"{name}: does not end with an answer of the assistant", "turn_order"
            )
    if not prompt:
        raise UnusableRowError("has no prompt: the two conversations have no turn in common")
    margin = _number(values, "margin") if "margin" in values else 0.0
    prompt = with_system(prompt, values)
    return PairExample(prompt, chosen, rejected, values.index, get_tools(values), margin, scores)


def create_judged(values: RoleValues) -> LabeledCompletion:
    """Create an example of an answer labeled as desirable or not."""
    return _judged(values, _verdict(values.get("label"), values.columns["label"]))


def create_scored(values: RoleValues) -> LabeledCompletion:
    """Create an example of an answer to score; it has no label and is marked as desirable."""
    return _judged(values, True)


def _judged(values: RoleValues, desirable: bool) -> LabeledCompletion:
    prompt = _prompt(values)
    if "completion" in values:
        answer = _answer(values, "completion", values.get("completion"))
    else:
        prompt, answer = prompt[:-1], prompt[-1:]
    if not answer or answer[-1].role != "assistant":
        raise UnusableRowError("does not end with an answer of the assistant", "turn_order")
    if not prompt:
        raise UnusableRowError("has no prompt")
    prompt = with_system(prompt, values)
    return LabeledCompletion(prompt, answer, desirable, values.index, get_tools(values))


def _verdict(value: object, column: str) -> bool:
    verdicts = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    verdict = verdicts.get(str(value).strip().lower())
    if verdict is None:
        raise UnusableRowError(f"{column!r} is {value!r}, where true or false is expected")
    return verdict


def _number(values: RoleValues, role: str) -> float:
    value = values.get(role)
    number = math.nan if isinstance(value, bool) else to_float(value)  # a text: a cell of CSV
    if not math.isfinite(number):
        raise UnusableRowError(f"{values.columns[role]!r} is {value!r}, where a number is expected")
    return number


def _prompt(values: RoleValues) -> Turns:
    for role in ("messages", "prompt", "question"):
        if role in values:
            value = values.get(role)
            if isinstance(value, list):
                column = values.columns[role]
                return tuple(parse_turns(value, column, needs_assistant=False, names=values.inner))
            text = check_text(value, repr(values.columns[role]))
            return tuple(_hh_turns(text)) or (Message("user", text),)
    if "instruction" in values:
        return (Message("user", prompt_text(values)),)
    return ()


def _answer(values: RoleValues, role: str, value: object) -> Turns:
    name = values.columns.get(role, role)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return tuple(parse_turns(value, name, names=values.inner))
    text = check_text(value, repr(name))
    turns = _hh_turns(text)
    if turns and "prompt" not in values and "messages" not in values:
        return tuple(turns)
    return (Message("assistant", text),)


def _hh_turns(text: str) -> list[Message]:
    """Returns the turns of a text in HH-RLHF's "Human: … Assistant: …" format; empty for others."""
    if not text.startswith("\n\nHuman:"):
        return []
    pieces = _HH.split(text)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [
        Message(names[speaker], content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1].role == "assistant" and not turns[-1].content:  # a trailing "\n\nAssistant:"
        turns.pop()
    if empty := next((turn.role for turn in turns if not turn.content), None):
        raise UnusableRowError(f"has an empty turn of the {empty}", "empty_text")
    return turns


def _same(one: Turns, other: Turns) -> bool:
    contents = [[t.content for t in turns if t.role != "system"] for turns in (one, other)]
    return contents[0] == contents[1]


def _two(values: RoleValues) -> tuple[object, object]:
    value = values.get("output")
    if not isinstance(value, list) or len(value) != 2:
        raise UnusableRowError(
            f"{values.columns['output']!r} is {json_type_name(value)}, where two answers are "
            "expected: the preferred one and the other"
        )
    return value[0], value[1]


def _best_and_worst(values: RoleValues) -> tuple[object, object, tuple[float, ...]]:
    """Returns the best and the worst answer, and their scores; without scores, minus the ranks."""
    value, column = values.get("ranked"), values.columns["ranked"]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UnusableRowError(
            f"{column!r} is {json_type_name(value)}, where a list of answers is expected"
        )
    graded = []
    for item in value:
        text = next((item[k] for k in ("answer", "response", "text", "content") if k in item), None)
        number = next((item[k] for k in ("score", "overall_score", "rating") if k in item), None)
        rank = item.get("rank")
        if number is None and isinstance(rank, int | float):
            number = -rank
        score = math.nan if isinstance(number, str) else to_float(number)
        if text is None or not math.isfinite(score):
            raise UnusableRowError(
                f"{column!r} has an answer without a text, or without rank and score"
            )
        graded.append((score, text))
    if len({number for number, _ in graded}) < 2:
        raise UnusableRowError(f"{column!r} has no pair of answers with a preference")
    best, worst = max(graded, key=lambda g: g[0]), min(graded, key=lambda g: g[0])
    return best[1], worst[1], (best[0], worst[0])


_PROMPTS = ("prompt", "question", "query")
_CHOSEN = ("chosen", "chosen_response", "preferred", "chosen_answer")
_REJECTED = ("rejected", "rejected_response", "dispreferred", "rejected_answer")
_MESSAGES = ("messages", "conversations")
_GRADES = {
    "score_chosen": ("score_chosen", "chosen_score", "chosen-rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected-rating"),
    "margin": ("margin",),
    **CHAT,
}

PAIR_SHAPES = (
    FormatSpec("prompt + chosen + rejected", create_pair,
          {"prompt": _PROMPTS, "chosen": _CHOSEN, "rejected": _REJECTED}, _GRADES, True, TURN_KEYS),
    FormatSpec("instruction + chosen + rejected", create_pair,
          {"instruction": ("instruction",), "chosen": _CHOSEN, "rejected": _REJECTED},
          {"input": ("input", "context"), **_GRADES}),
    FormatSpec("messages + chosen + rejected", create_pair,
          {"messages": _MESSAGES, "chosen": _CHOSEN, "rejected": _REJECTED}, _GRADES, False,
          TURN_KEYS),
    FormatSpec("chosen + rejected", create_pair, {"chosen": _CHOSEN, "rejected": _REJECTED},
          _GRADES, False, TURN_KEYS),
    FormatSpec("messages + rejected", create_pair, {"messages": _MESSAGES, "rejected": _REJECTED},
          _GRADES, False, TURN_KEYS),
    FormatSpec("prompt + answers", create_pair,
          {"prompt": (*_PROMPTS, "instruction"), "ranked": ("answers", "completions")}, CHAT,
          False),
    FormatSpec("instruction + output", create_pair,
          {"instruction": ("instruction",), "output": ("output",)},
          {"input": ("input",), **CHAT}, False),
)  # fmt: skip
_LABEL = ("label", "kto_tag", "desirable")
JUDGED_SHAPES = (
    FormatSpec(
        "prompt + completion + label",
        create_judged,
        {"prompt": _PROMPTS, "completion": ("completion", "response", "answer"), "label": _LABEL},
        CHAT,
        True,
        TURN_KEYS,
    ),
    FormatSpec(
        "messages + label",
        create_judged,
        {"messages": _MESSAGES, "label": _LABEL},
        CHAT,
        False,
        TURN_KEYS,
    ),
)
