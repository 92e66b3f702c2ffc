"""Base class of all tasks and the types of their predictions."""

from __future__ import annotations

import functools
import importlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from ftlevel.config import TASKS as NAMES
from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.detect import Format, FormatSpec, NoFormatError, detect_format, fits
from ftlevel.data.prepare.encoder import DataTask
from ftlevel.data.sources.table import Row
from ftlevel.errors import ConfigError, InputError, join_names, with_article
from ftlevel.extensions import added, warn_skipped
from ftlevel.models.sources import ModelSource
from ftlevel.objectives import Objective, ScoreTexts

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Column = Literal["text", "texts", "number", "numbers", "whole", "ranking", "rankings", "embedding"]
"""Type of a prediction column; an embedding is a float32 array (dims,).

A ranking is a list of `{"answer": ..., "probability": ...}`, most likely first.
"""


@dataclass(frozen=True)
class Prediction:
    """Prediction for one prompt or row; `columns` are the values of `BaseTask.prediction_columns`.

    `scores` maps classes or words to probabilities; `tags` has (word, tag) pairs. Empty if unused.
    """

    text: str
    scores: dict[str, float] = field(default_factory=dict)
    tags: list[tuple[str, str | None]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputOptions:
    """Optional outputs of a prediction; `top_k` is the length of the ranking, 0 for none.

    `normalize` and `dims` change embeddings; None keeps the model's setting.
    """

    probabilities: bool = False
    top_k: int = 0
    normalize: bool | None = None
    dims: int | None = None


class PromptedModel(Protocol):
    """Interface of a loaded model that tasks use for inference, with its model card's settings."""

    tokenizer: Any
    kind: str
    labels: Sequence[str]
    options: Mapping[str, Any]
    max_length: int
    prompt_format: PromptFormat | None

    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Returns the generated text per prompt; raises `UnansweredError` for a too long prompt."""

    def fit_rows(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """Returns rows cut to the model's positions; `UnansweredError` if they may not be cut."""

    def score(self, rows: Sequence[Encoded], read: Callable[[Encoded, Tensor], T]) -> list[T]:
        """Returns `read(row, logits)` for each row, in order; the logits are freed after each call.

        The logits are `(...)` per row or `(seq, ...)` per token; for language heads they are
        `(labeled tokens, vocabulary)`. Raises UnansweredError for rows longer than the positions.
        """

    def score_batches(
        self,
        rows: Sequence[Encoded],
        read: Callable[[Sequence[Encoded], Tensor, Tensor], Sequence[T]],
    ) -> list[T]:
        """Returns the results of `read` for each row, in order; raises as `score` does.

        `read` is called per forward pass, with its rows, their logits `(rows, seq, …)`, and the
        mask `(rows, seq)`, which is 0 for padding.
        """


TokenDecoder = Callable[[Sequence[int]], list[str]]
"""Token ids → text of each."""


@dataclass(frozen=True, kw_only=True)
class BaseTask(DataTask):
    """Base class of tasks; subclasses override what differs. See `DataTask` for rows.

    Attributes:
        query_shapes: column layouts of rows without answers, for `ftlevel predict`.
        auto_classes: type of model -> transformers auto class.
        peft_types: type of model -> PEFT `TaskType`; other types use a plain `PeftModel`.
        headline: name of the main metric, without `eval_`; it is printed first.
        generates: whether generated text is evaluated by default.
        score_texts: function that scores generated texts.
        text_metrics: names of the metrics of `score_texts`.
        refusals: type of model -> hint in the error for an unsupported model.
        has_new_head: whether the head is newly initialized and fully trained.
        served_as: model type in the list of what a server supports; unused for text generation.
        finds_ends_by_padding: whether the model locates a row's last token by its padding.
        head_like: task whose models have the same head; "" if the head is specific to this task.
        separates_padding: whether the padding token must differ from EOS.
        predicts_training_rows: whether `predict` accepts the layouts of training rows.
        synthetic_info: result of `data_info` assumed for synthetic batches.
        synthetic_labels: class or tag names assumed for synthetic batches.
        model_description: what the error for an unsupported output calls the model; "": the task.
        prediction_type: type of the only prediction column, unless the task has several.
        hooks: reference to the task's `training.hooks.TrainingHooks`.
        exporter: reference to the task's `extras.serving.formats.Exporter`; "": the default.
        trains_language_head: whether it continues adapters of other tasks that generate text.
    """

    auto_classes: Mapping[str, str]
    peft_types: Mapping[str, str]
    headline: str
    generates: bool = False
    score_texts: ScoreTexts | None = None
    text_metrics: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    query_shapes: tuple[FormatSpec, ...] = ()

    has_new_head: ClassVar[bool] = False
    generates_text: ClassVar[bool] = False
    served_as: ClassVar[str] = "classifiers"
    finds_ends_by_padding: ClassVar[bool] = False
    head_like: ClassVar[str] = ""
    separates_padding: ClassVar[bool] = False
    needs_context: ClassVar[bool] = False
    predicts_training_rows: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = True
    synthetic_labels: ClassVar[tuple[str, ...]] = ()
    synthetic_info: ClassVar[Mapping[str, Any]] = {}
    model_description: ClassVar[str] = ""
    prediction_type: ClassVar[Column] = "text"
    hooks: ClassVar[str] = "ftlevel.training.hooks:TrainingHooks"
    exporter: ClassVar[str] = ""
    trains_language_head: ClassVar[bool] = False

    def configured(self, task_config: Mapping[str, Any]) -> BaseTask:
        """Returns the task with the settings `task_config`, from a configuration or model card."""
        return self

    # ---- the model

    def for_model(
        self, source: ModelSource, kind: str, width: int, tokenizer: Any, step_rows: int
    ) -> tuple[BaseTask, list[Choice]]:
        """Returns the task adapted to the model, and log lines about its settings.

        `kind` is encoder, decoder or encoder-decoder, `width` the hidden size, `step_rows` the rows
        of an optimizer step. Raises `ConfigError` for settings that do not fit the model.
        """
        return self, []

    def auto_class(self, kind: str, model_type: str) -> str:
        """Returns the transformers auto class for `kind`; ConfigError if the task needs another."""
        if kind in self.auto_classes:
            return self.auto_classes[kind]
        supported = join_names(self.auto_classes)
        raise ConfigError(
            f"--task {self.name} cannot be used with {model_type}, which is {with_article(kind)}; "
            f"it needs {with_article(supported)}. {self.refusals.get(kind, '')}".strip()
        )

    @property
    def stop_texts(self) -> Sequence[str]:
        """Texts at which generation stops."""
        return ()

    @property
    def max_tokens(self) -> int | None:
        """Maximum tokens of a sequence; None if only the model's positions limit it."""
        return None

    def prepare_tokenizer(self, tokenizer: Any, kind: str) -> Choice | None:
        """Adapt `tokenizer` (modified) to models of `kind`, and return the log line, if any."""
        return None

    def get_heads(self, meta: Any, source: Any) -> tuple[list[str], list[str]]:
        """Returns two lists of module names: to train in full, and missing in some checkpoints."""
        if not self.has_new_head:
            return [], []
        from ftlevel.models.loading import get_new_poolers
        from ftlevel.models.module_tree import get_heads

        heads = list(dict.fromkeys([*get_new_poolers(meta, source), *get_heads(meta)]))
        return heads, heads

    def get_unused_modules(self, meta: Any) -> list[str]:
        """Returns names of modules of `meta` (on device meta) that the loss does not use."""
        return []

    @property
    def head_message(self) -> str:
        """Log text about the modules of `get_heads`, e.g. why they are trained in full."""
        return "trained in full and saved"

    @abstractmethod
    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        """Create the objective; `data_info` is `PreparedData.info` or from a model card."""

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that inference needs, stored as `options` in the model card."""
        return {}

    def merged_options(self, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """Returns the model card's `options` for a merged model, and a note on what it lacks."""
        return options, ""

    def inherited_config(
        self, directory: Path, inference_config: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Returns config section -> settings that a run takes over from the adapter it starts from.

        `inference_config` is that of the model card; empty without a card.
        """
        return {}

    def get_output_format(self, inference_config: Mapping[str, Any], model_config: Any) -> Any:
        """Returns the format of embeddings, which may be compared across tokenizers; else None."""
        return None

    def recognizes(self, directory: Path) -> bool:
        """Whether files in `directory` say that its model is for this task."""
        return False

    def check_model(self, source: ModelSource, model_config: Any) -> None:
        """Raise `InputError` if a full model without a card was trained for another task."""

    def write_files(
        self, directory: Path, model_config: Any, inference_config: Mapping[str, Any]
    ) -> None:
        """Write the files for loading the adapter or model with sentence-transformers, if any."""

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns `prompt`, `labels` and `options` as in a model card, for a model without one."""
        return {}

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic row of tokens `ids` with many targets, to estimate memory."""
        return Encoded(ids, list(ids), row)

    def head_signature(self, labels: Sequence[str]) -> str:
        """Returns a text that is the same for two models only if their heads are compatible."""
        return f"{self.name} of {', '.join(labels)}" if labels else self.name

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format of a table; if none fits, the `InputError` suggests another task."""
        try:
            return super().get_format(column_names, config, rows)
        except NoFormatError as error:
            others = (task for task in load_tasks().values() if task.name != self.name)
            other = next((task.name for task in others if fits(column_names, task.shapes)), None)
            if other is None:
                raise
            raise InputError(f"{error} These columns fit --task {other}.") from None

    # ---- inference and display

    def get_query_format(
        self,
        column_names: Sequence[str],
        mapping: Mapping[str, str],
        name: str | None = None,
        rows: Sequence[Row] = (),
    ) -> Format:
        """Returns the format of a table without answers.

        `mapping` (role -> column) is from `--map`, `name` from `--format`. Raises `ConfigError` if
        the task has no `query_shapes`, `InputError` if none of these layouts matches.
        """
        if not self.query_shapes:
            raise ConfigError(
                f"--task {self.name} does not support predict. Use ftlevel generate --prompt."
            )
        return detect_format(column_names, self.name, self.query_shapes, mapping, name, rows)

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        """Returns suffix -> type of each output column; the answer's column has the suffix "".

        Raises `ConfigError` if the task does not support an optional output.
        """
        check_options(outputs, self.model_description or f"--task {self.name}", "")
        return {"": self.prediction_type}

    @abstractmethod
    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        """Create example `number`, without an answer, from `prompt` and, if needed, `context`."""

    @abstractmethod
    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        """Returns one prediction per query (see `create_query`); `queries[i].row` must be i.

        Raises `UnansweredError` if some queries cannot be answered.
        """

    def predict_prompts(
        self, model: PromptedModel, prompts: Sequence[str], context: str | None
    ) -> list[Prediction]:
        """Returns one prediction per prompt, with `context` if needed; raises as `predict` does."""
        queries = [self.create_query(prompt, context, i) for i, prompt in enumerate(prompts)]
        return self.predict(model, queries, OutputOptions())

    @abstractmethod
    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        """Returns labels for a row of random tokens `ids`, in the format of training rows."""

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns each token's target as text: "" if it is the token itself, None if there is none.

        `names` are class or tag names, `kind` is that of the model.
        """
        labels, count = row.labels, len(row.input_ids)
        if not isinstance(labels, list) or len(labels) != count:
            return [None] * count
        return [None if label == IGNORED else "" for label in labels]

    def get_decoder_labels(self, row: Encoded, kind: str) -> list[int]:
        """Returns the row's target ids for an encoder-decoder; empty for other models."""
        return []

    def decode_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Returns a text for display: the row's label, the token ranges of its texts, or ""."""
        return ""


def check_options(outputs: OutputOptions, name: str, advice: str) -> None:
    """Raise `ConfigError` if `outputs` requests probabilities, which `name` does not have."""
    for flag, value in (("--probabilities", outputs.probabilities), ("--top-k", outputs.top_k)):
        if value:
            raise ConfigError(f"{flag}: {name} has no probabilities. {advice or f'Drop {flag}.'}")


def rank(scores: Mapping[str, float], top_k: int) -> list[dict[str, Any]]:
    """Returns the `top_k` most probable of `scores` (name -> probability), best first."""
    best = sorted(scores.items(), key=lambda item: -item[1])[:top_k]
    return [{"answer": name, "probability": score} for name, score in best]


@functools.cache
def load_tasks() -> dict[str, BaseTask]:
    """Returns name -> task; warns of extensions that cannot be imported, and skips their tasks."""
    tasks: dict[str, BaseTask] = {}
    packages = added("tasks")
    for name in NAMES:
        try:
            module = importlib.import_module(NAMES[name])
            tasks[name] = next(task for task in module.TASKS if task.name == name)
        except Exception as error:
            if name not in packages:
                raise
            warn_skipped(packages[name][0], error)
    return tasks
