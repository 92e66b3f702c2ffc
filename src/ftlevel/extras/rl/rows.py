"""Rows of prompts with rewards and of sampled completions, and the column layouts of prompts.

Reward functions get all columns of a row by name, and the answer also as `answer`. Stand-ins are
made-up completions, on which the training step is checked before anything is sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import IGNORED, Encoded, RowError
from ftlevel.data.formats.detect import FormatSpec, RoleValues
from ftlevel.data.formats.examples import Conversation, ExampleContent, create_query_conversation
from ftlevel.errors import InputError
from ftlevel.tasks.text import CHAT, TURN_KEYS, encode_query

Signal = tuple[float, float, float, float, float]
"""Advantage, weight, and three log-probabilities: old, of the reference, and of the sampler.

Unknown ones are NaN: `old` is then the policy's own, and there is no KL penalty. In on-policy
distillation the reference is the teacher, and the advantage is not used.
"""

UNKNOWN = math.nan


@dataclass(frozen=True)
class CompletionRow(Encoded):
    """A prompt of `prompt` tokens with a sampled completion; `values` has a `Signal` per token.

    `number` is the index of the completion among those of its prompt.
    """

    prompt: int = 0
    number: int = 0
    values: tuple[Signal, ...] = ()

    @property
    def loss_inputs(self) -> Mapping[str, Sequence[Signal]]:
        """A `Signal` (advantage, weight, …) per token of the completion."""
        return {"signals": self.values}

    @property
    def completion(self) -> list[int]:
        return self.input_ids[self.prompt :]

    def on_policy(self) -> CompletionRow:
        """Returns the row for the policy that sampled it: ratios are 1, without rounding."""
        values = ((a, weight, UNKNOWN, *others) for a, weight, _, *others in self.values)
        return replace(self, values=tuple(values))  # type: ignore[arg-type]


TokenLogps = Callable[[Sequence[CompletionRow]], list[list[float]]]
"""Rows → log-probabilities of their completions' tokens."""


def create_completion_row(
    prompt: list[int], completion: list[int], row: int, number: int, values: Sequence[Signal]
) -> CompletionRow:
    """Create the row of completion `number` of a prompt; `values` has a `Signal` for each token."""
    labels = [IGNORED] * len(prompt) + completion
    return CompletionRow(prompt + completion, labels, row, {}, len(prompt), number, tuple(values))


STAND_INS = 2
STAND_IN_TOKENS = 8


def stand_in_completions(
    prompt: list[int], row: int, num_completions: int = STAND_INS, tokens: int = STAND_IN_TOKENS
) -> Iterator[CompletionRow]:
    """Yields synthetic completions of `prompt`, `tokens` long each, with advantages 1 and -1."""
    for number in range(num_completions):
        ids = [prompt[(7 * at + 3 * number) % len(prompt)] for at in range(tokens)]
        signal = (1.0 - 2 * (number % 2), 1 / tokens, UNKNOWN, UNKNOWN, UNKNOWN)
        yield create_completion_row(prompt, ids, row, number, [signal] * len(ids))


ANSWER = "answer"


@dataclass(frozen=True)
class PromptExample:
    """A prompt and the columns for reward functions; `is_chat`: the prompt has messages."""

    query: Conversation
    columns: Mapping[str, Any]
    is_chat: bool

    @property
    def row(self) -> int:
        return self.query.row

    @property
    def key_text(self) -> str:
        return f"{self.query.key_text}\0{self.columns.get(ANSWER)}"

    @property
    def content(self) -> ExampleContent:
        """The prompt, and the answer that completions are compared with, for duplicate checks."""
        input_text = "\n".join(m.content for m in self.query.messages if m.role != "system")
        before = f"{self.query.key_text}\0{self.query.tools or ''}"
        return ExampleContent(input_text, "", before, str(self.columns.get(ANSWER, "")))

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """The prompt as reward functions get it: a text, or messages."""
        if self.is_chat:
            return [message.to_dict() for message in self.query.messages]
        return self.query.messages[-1].content


@dataclass(frozen=True)
class PromptRow(Encoded):
    """An encoded prompt without labels.

    `facts_json` has the prompt and the columns for reward functions; `most` is the maximum
    number of tokens of a completion.
    """

    facts_json: str = field(default="{}", metadata={"column": "text"})
    most: int = field(default=0, metadata={"column": "int"})

    @property
    def length(self) -> int:
        """Number of tokens of the prompt plus the longest possible completion."""
        return len(self.input_ids) + self.most

    @property
    def sequences(self) -> Sequence[Encoded]:
        """The prompt with synthetic completions, for checks and estimates before sampling."""
        return [
            Encoded(row.input_ids, row.labels, row.row)
            for row in stand_in_completions(self.input_ids, self.row)
        ]

    @property
    def loss_inputs(self) -> Mapping[str, Sequence[Signal]]:
        rows = stand_in_completions(self.input_ids, self.row)
        return {"signals": [signal for row in rows for signal in row.values]}

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        prompt: str | list[dict[str, Any]] = json.loads(self.facts_json)["prompt"]
        return prompt

    @property
    def columns(self) -> dict[str, Any]:
        """Column → value, as passed to the reward functions."""
        columns: dict[str, Any] = json.loads(self.facts_json)["columns"]
        return columns


@dataclass(frozen=True)
class RlPromptEncoder:
    """Callable that encodes prompts; it is picklable for worker processes."""

    tokenizer: Any
    prompt_format: PromptFormat
    most: int

    def __call__(self, examples: Sequence[PromptExample]) -> list[Encoded]:
        """Returns one row per prompt; raises `RowError` if the chat template rejects it."""
        return [self._encode(example) for example in examples]

    def _encode(self, example: PromptExample) -> Encoded:
        try:
            ids = encode_query(self.tokenizer, self.prompt_format, example.query)
        except InputError as error:
            raise RowError(example.row, str(error)) from error
        text = json.dumps({"prompt": example.prompt, "columns": example.columns}, default=str)
        return PromptRow(ids, [IGNORED] * len(ids), example.row, {}, text, self.most)


_NAMED = ("prompt", "completion", "completion_ids", "messages")
"""Columns that reward functions get under other names, or not at all."""


def create_prompt(values: RoleValues) -> PromptExample:
    """Create the example of a row: its prompt and columns."""
    columns = {name: value for name, value in values.row.items() if name not in _NAMED}
    if (answer := _answer(values)) is not None:
        columns[ANSWER] = answer
    is_chat = any(isinstance(values.get(role), list) for role in ("prompt", *_TALKS))
    return PromptExample(create_query_conversation(values), columns, is_chat)


def _answer(values: RoleValues) -> Any:
    """Returns the reference: column `answer`, verl's `reward_model.ground_truth`, or None."""
    if ANSWER in values:
        return values.get(ANSWER)
    reward_model = values.row.get("reward_model")
    return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None


_MORE = {ANSWER: (ANSWER, "solution", "ground_truth", "target"), **CHAT}
_TALKS = ("messages", "conversations")

PROMPT_SHAPES = (
    FormatSpec(
        "prompt",
        create_prompt,
        {"prompt": ("prompt", "question", "problem", "query")},
        _MORE,
        True,
        TURN_KEYS,
    ),
    FormatSpec("messages", create_prompt, {"messages": _TALKS}, _MORE, False, TURN_KEYS),
    FormatSpec(
        "instruction",
        create_prompt,
        {"instruction": ("instruction",)},
        {"input": ("input", "context"), **_MORE},
        False,
    ),
)
