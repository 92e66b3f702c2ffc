"""What every task is, whatever it predicts: the answers that most of them give to the rest."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from ftlevel.config import TASKS as NAMES
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import IGNORED, Encoded, PromptFormat
from ftlevel.data.formats.detect import Format, NoFormatError, Shape, Wish, detect_format, fits
from ftlevel.data.sources.table import Row
from ftlevel.errors import ConfigError, InputError, listing, with_article
from ftlevel.task import Objective, ScoreTexts, Task

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Column = Literal["text", "texts", "number", "numbers", "whole", "ranking", "rankings"]
"""What a column of answers holds. A ranking is a list of `{"answer": …, "probability": …}`, the
likeliest first; rankings are a list of these."""


@dataclass(frozen=True)
class Reply:
    """What a model says to one prompt or row.

    Attributes:
        text: to be shown.
        scores: class or word → probability; empty where there are none.
        tags: each word with its tag; empty but for token classification.
        columns: the same as values of the columns that `BaseTask.answer_columns` names.
    """

    text: str
    scores: dict[str, float] = field(default_factory=dict)
    tags: list[tuple[str, str]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside the answer of a row.

    Attributes:
        probabilities: how likely each answer is.
        top_k: the likeliest answers, so many; 0 for none.
    """

    probabilities: bool = False
    top_k: int = 0


class PromptedModel(Protocol):
    """A model that is asked.

    Attributes:
        tokenizer: its tokenizer.
        kind: kind of the model.
        labels: names of the classes or tags.
        options: of the task, as `card_options` gave them.
        max_length: of a training row, in tokens.
        prompt_format: as in training; None where there are no prompts.
    """

    tokenizer: Any
    kind: str
    labels: Sequence[str]
    options: Mapping[str, Any]
    max_length: int
    prompt_format: PromptFormat | None

    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Return the text that it writes after each prompt, given as token ids.

        Raises:
            UnansweredError: prompts that leave no room for an answer.
        """

    def score(self, rows: Sequence[Encoded], read: Callable[[Encoded, torch.Tensor], T]) -> list[T]:
        """Return what `read` makes of each row and its logits, in order.

        The logits are of the row, `(…)`, or of its tokens, `(seq, …)`, or, where a language head
        predicts tokens, of those with a label, `(labelled, vocabulary)`. They go when `read` ends.

        Raises:
            UnansweredError: rows beyond the model's positions.
        """


class Speller(Protocol):
    """Says what text each token stands for."""

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each of `ids`."""


@dataclass(frozen=True)
class BaseTask(Task):
    """A task; a kind of target derives from it, and says what is different.

    Attributes:
        name: as in `--task`.
        shapes: what it can make of columns; of those that fit, the first is taken.
        questions: the same of rows that have no answer yet, for `ftlevel predict`.
        auto_classes: kind of model → transformers' auto class.
        peft_types: kind of model → PEFT's TaskType; a kind without one is a plain `PeftModel`.
        headline: the metric that is shown first, without prefix.
        instruction: what a decoder or T5 is told before the source text; empty for none.
        answer_cue: what ends the prompt of a model without a chat template.
        generates: whether generated text is scored by default.
        score_texts: scores generated texts against references in a language ("" if unknown).
        text_metrics: the names of those scores.
        refusals: kind of model → why the task cannot be had, and what to do.
        builtin_subset: which part of `builtin:docstrings` is read; empty for all.
        has_new_head: whether the head is new on a pretrained model, and so trained in full.
        writes_text: whether the model writes text.
        finds_ends_by_padding: whether the model finds the end of a row by its padding token.
        head_like: the task whose head it has, where that is not a kind of its own.
        pads_apart: whether padding has to be another token than EOS, which ends its rows.
        wants_context: whether a question is asked about a text of its own.
        imagined_facts: what the data would say of itself, where that is not usual.
        imagined_labels: names of classes or tags where there is no data to know them from.
    """

    name: str
    shapes: tuple[Shape, ...]
    auto_classes: Mapping[str, str]
    peft_types: Mapping[str, str]
    headline: str
    instruction: str = ""
    answer_cue: str = ""
    generates: bool = False
    score_texts: ScoreTexts | None = None
    text_metrics: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    builtin_subset: str = ""
    questions: tuple[Shape, ...] = ()

    has_new_head: ClassVar[bool] = False
    writes_text: ClassVar[bool] = False
    finds_ends_by_padding: ClassVar[bool] = False
    head_like: ClassVar[str] = ""
    pads_apart: ClassVar[bool] = False
    wants_context: ClassVar[bool] = False
    imagined_labels: ClassVar[tuple[str, ...]] = ()
    imagined_facts: ClassVar[Mapping[str, Any]] = {}

    def configured(self, options: Mapping[str, Any]) -> BaseTask:
        """Return the task as a configuration or a card has it, by what `card_options` holds."""
        return self

    # ---- the model

    def auto_class(self, kind: str, model_type: str) -> str:
        """Return transformers' auto class for a model of `kind`.

        Raises:
            ConfigError: the task cannot be done by such a model.
        """
        if kind in self.auto_classes:
            return self.auto_classes[kind]
        wanted = listing(self.auto_classes)
        raise ConfigError(
            f"--task {self.name} cannot be used with {model_type}, which is {with_article(kind)}; "
            f"it needs {with_article(wanted)}. {self.refusals.get(kind, '')}".strip()
        )

    def find_heads(self, meta: Any, source: Any) -> tuple[list[str], list[str]]:
        """Return the modules to train in full, and those whose weights a checkpoint may lack.

        Args:
            meta: the model on the meta device.
            source: where its weights are.
        """
        if not self.has_new_head:
            return [], []
        from ftlevel.models.loading import find_new_poolers
        from ftlevel.models.targets import find_heads

        heads = list(dict.fromkeys([*find_new_poolers(meta, source), *find_heads(meta)]))
        return heads, heads

    @property
    def why_heads(self) -> str:
        """Why the modules that `find_heads` gave are trained in full, for the screen."""
        return "trained in full and saved"

    @abstractmethod
    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Return what a model of `kind` is trained on.

        Args:
            kind: encoder, decoder or encoder-decoder.
            facts: of the data, or of a card: its labels and what `card_options` gave.
        """

    def card_options(self, config: DataConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what else must be known to ask the model as it was trained."""
        return {}

    def stand_in(self, model_config: Any, tokenizer: Any, kind: str) -> dict[str, Any]:
        """Return `prompt`, `labels` and `options` of a card for a model that has none."""
        return {}

    def imagine_row(self, ids: list[int], row: int) -> Encoded:
        """Return a row of the tokens `ids` as a forecast takes it: it computes the most it can."""
        return Encoded(ids, list(ids), row)

    def describe_head(self, labels: Sequence[str]) -> str:
        """Return what tells the head apart from one that answers otherwise."""
        return f"{self.name} of {', '.join(labels)}" if labels else self.name

    # ---- from columns to encoded rows

    def find_format(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Return what `columns` are used for; else name the task that they would fit."""
        mapping = {**self.own_mapping(columns, config, rows), **config.columns}
        try:
            return detect_format(
                columns, self.name, self.shapes, Wish(mapping, config.format), rows
            )
        except NoFormatError as error:
            others = (task for task in map(find_task, NAMES) if task.name != self.name)
            other = next((task.name for task in others if fits(columns, task.shapes)), None)
            if other is None:
                raise
            raise InputError(f"{error} These columns fit --task {other}.") from None

    def own_mapping(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row]
    ) -> Mapping[str, str]:
        """Return the column of roles that settings other than `--map` tell."""
        return {}

    # ---- answers, probes and pictures

    def find_questions(
        self,
        columns: Sequence[str],
        mapping: Mapping[str, str],
        name: str | None = None,
        rows: Sequence[Row] = (),
    ) -> Format:
        """Return what `columns` of rows without an answer are used for.

        Args:
            columns: of the rows.
            mapping: column by role, as given with `--map`.
            name: the only format to try, as given with `--format`.
            rows: some of them.

        Raises:
            ConfigError: the task answers prompts only.
            InputError: the columns fit none of `questions`.
        """
        if not self.questions:
            raise ConfigError(
                f"--task {self.name} answers no rows. Ask it by ftlevel generate --prompt."
            )
        wish = Wish(mapping, name, aim="ask")
        return detect_format(columns, self.name, self.questions, wish, rows)

    def answer_columns(
        self, format_: Format, labels: Sequence[str], options: Mapping[str, Any], wanted: Wanted
    ) -> dict[str, Column]:
        """Return the columns of an answer: end of the name → what it holds; "" is the answer.

        Args:
            format_: as `find_questions` gave it.
            labels: names of the classes or tags.
            options: as `card_options` gave them.
            wanted: what else the user wishes.

        Raises:
            ConfigError: a wish that the task cannot fulfil.
        """
        refuse_wishes(wanted, f"--task {self.name}", "")
        return {"": "text"}

    @abstractmethod
    def pose(self, prompt: str, context: str | None, number: int) -> Any:
        """Return the question that a `prompt` is, as a row of `questions` would be.

        Args:
            prompt: what is asked.
            context: where answers are looked for; given where the task wants one.
            number: of the question, from 0.
        """

    @abstractmethod
    def answer_rows(
        self, model: PromptedModel, questions: Sequence[Any], wanted: Wanted
    ) -> list[Reply]:
        """Return what `model` says to each of `questions`, whose `row` is 0, 1, ….

        Args:
            model: what is asked.
            questions: what the builders of `self.questions`, or `pose`, made.
            wanted: what the replies' `columns` hold beside the answer.

        Raises:
            UnansweredError: questions that nothing can be said to.
        """

    def answer(
        self, model: PromptedModel, prompts: Sequence[str], context: str | None
    ) -> list[Reply]:
        """Return what `model` says to each prompt.

        Args:
            model: what is asked.
            prompts: one or more.
            context: where answers are looked for; given where the task wants one.

        Raises:
            UnansweredError: prompts that nothing can be said to.
        """
        questions = [self.pose(prompt, context, i) for i, prompt in enumerate(prompts)]
        return self.answer_rows(model, questions, Wanted())

    @abstractmethod
    def probe_labels(self, ids: Sequence[int], labels: Sequence[str], options: Any) -> Any:
        """Return labels for a row of random tokens, of the form that training rows have.

        Args:
            ids: the row.
            labels: names of the classes or tags.
            options: as `card_options` gave them.
        """

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, speller: Speller
    ) -> list[str | None]:
        """Return what is learned at each token of `row`; "" for the token itself, None for nothing.

        Args:
            row: an encoded row.
            names: of the classes or tags.
            kind: of the model.
            speller: says what text a token stands for.
        """
        labels, count = row.labels, len(row.input_ids)
        if not isinstance(labels, list) or len(labels) != count:
            return [None] * count
        return [None if label == IGNORED else "" for label in labels]

    def show_answer(self, row: Encoded, kind: str) -> list[int]:
        """Return the ids of a target that is apart from the row, as an encoder-decoder's."""
        return []

    def show_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Return what is learned of the whole row; "" where tokens are learned."""
        return ""


def refuse_wishes(wanted: Wanted, whose: str, instead: str) -> None:
    """Refuse what `wanted` asks for beside an answer.

    Args:
        wanted: the wish.
        whose: what has no such thing.
        instead: what to do; "" for nothing.

    Raises:
        ConfigError: it asks for something.
    """
    for flag, wish in (("--probabilities", wanted.probabilities), ("--top-k", wanted.top_k)):
        if wish:
            raise ConfigError(
                f"{flag}: {whose} has no probabilities to give. {instead or f'Drop {flag}.'}"
            )


def rank(scores: Mapping[str, float], count: int) -> list[dict[str, Any]]:
    """Return the `count` likeliest of `scores` as a column of rankings holds them."""
    best = sorted(scores.items(), key=lambda item: -item[1])[:count]
    return [{"answer": name, "probability": score} for name, score in best]


def find_task(name: str) -> BaseTask:
    """Return the task called `name`: the one of that name among its module's `TASKS`."""
    tasks: tuple[BaseTask, ...] = importlib.import_module(NAMES[name]).TASKS
    return next(task for task in tasks if task.name == name)
