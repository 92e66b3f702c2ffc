"""From the data section of the configuration to encoded rows, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.artifacts.fingerprint import rows_fingerprint
from ftlevel.config import DataConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encode import Encoded, encode_causal, encode_labelled, encode_seq2seq
from ftlevel.data.examples import drop_bad_rows, to_examples
from ftlevel.data.fit import Fitted, fit_rows, fit_targets
from ftlevel.data.formats import Format, detect_format
from ftlevel.data.labels import LabelSet, build_label_set, check_labels
from ftlevel.data.prompts import PromptFormat, choose_format
from ftlevel.data.sources import Splits, hold_out, load_splits
from ftlevel.data.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import Task

_BUILTIN_KIND = {"summarization": "summarization"}
BUILTIN_ROWS = 384
"""Training rows taken from the built-in set where the user gives no number: a quick first run."""


@dataclass(frozen=True)
class Loaded:
    """The rows as read, before a tokenizer sees them.

    Attributes:
        splits: tables of the splits.
        format: what the columns are.
        train: examples of the training split.
        validation: examples of the validation split, or None.
        labels: the classes, or None.
    """

    splits: Splits
    format: Format
    train: list[Any]
    validation: list[Any] | None
    labels: LabelSet | None


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready for the model.

    Attributes:
        train: encoded training rows.
        validation: encoded validation rows; empty if there are none.
        prompt_format: how prompts are laid out; None for classes.
        max_length: in tokens.
        facts: what summary.json says of the data.
        choices: lines for the screen.
    """

    train: list[Encoded]
    validation: list[Encoded]
    prompt_format: PromptFormat | None
    max_length: int
    facts: dict[str, Any] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)


def load_examples(config: DataConfig, task: Task, seed: int) -> Loaded:
    """Read the data set and turn its rows into examples of `task`.

    Raises:
        InputError: with `path:line`, for whatever cannot be read or learned from.
    """
    builtin = config.dataset.startswith("builtin:")
    splits = load_splits(
        config.dataset,
        split=config.split,
        subset=_BUILTIN_KIND.get(task.name) if builtin and not config.subset else config.subset,
        on_bad_row=config.on_bad_row,
        max_samples=BUILTIN_ROWS if builtin and config.max_samples is None else None,
    )
    if config.validation_split:
        splits = hold_out(splits, config.validation_split, seed)
    train, validation = splits.train, splits.validation
    if config.max_samples and config.max_samples < len(train):
        train = replace(train.take(range(config.max_samples)), dropped=train.dropped)
    if validation is not None and config.max_eval_samples:
        validation = validation.take(range(min(len(validation), config.max_eval_samples)))
    shape = detect_format(train.columns, task.name, config.columns)
    if config.on_bad_row == "skip":
        train = drop_bad_rows(train, shape)
        validation = drop_bad_rows(validation, shape) if validation else validation
    examples: list[Any] = list(to_examples(train, shape))
    held_out: list[Any] | None = None
    if validation is not None:
        held_out = list(to_examples(validation, shape))
    labels = None
    if task.labelled:
        labels = build_label_set(examples, train, shape.columns["label"])
        if held_out is not None and validation is not None:
            check_labels(labels, held_out, validation)
    kept = Splits(train, validation, splits.test, splits.name, splits.notes)
    return Loaded(kept, shape, examples, held_out, labels)


def prepare_examples(
    loaded: Loaded,
    config: DataConfig,
    task: Task,
    kind: str,
    tokenizer: Any,
    model: Any,
    positions: int | None,
) -> Prepared:
    """Encode the examples and make them fit.

    Args:
        loaded: what `load_examples` returned.
        config: the data section.
        task: the task.
        kind: kind of the model.
        tokenizer: the model's tokenizer.
        model: the model's config, for the size of its vocabulary.
        positions: longest sequence that the model takes, or None.

    Raises:
        InputError: rows do not fit, or hold token ids that the model has no embedding for.
    """
    prompt_format = None
    if not task.labelled:
        prompt_format = choose_format(tokenizer, kind, task.instruction, task.answer_cue)
    encoder = _Encoder(task, kind, tokenizer, prompt_format, loaded.labels)
    train = _fit(encoder(loaded.train), config, kind, task, positions, loaded.splits.train)
    _check_vocabulary(train.rows, model, loaded.splits.train)
    validation: list[Encoded] = []
    if loaded.validation:
        table = loaded.splits.validation or loaded.splits.train
        bounded = config.model_copy(update={"max_length": train.max_length, "overlong": "drop"})
        fitted = _fit(encoder(loaded.validation), bounded, kind, task, positions, table)
        validation = fitted.rows
    facts = _facts(loaded, train, validation)
    return Prepared(
        train.rows,
        validation,
        prompt_format,
        train.max_length,
        facts,
        _choices(loaded, train, validation, facts, prompt_format),
    )


@dataclass(frozen=True)
class _Encoder:
    task: Task
    kind: str
    tokenizer: Any
    prompt_format: PromptFormat | None
    labels: LabelSet | None

    def __call__(self, examples: Sequence[Any]) -> list[Encoded]:
        labels = self.labels
        if labels is not None:
            return encode_labelled(
                self.tokenizer, examples, lambda example: labels.id_of(example.label)
            )
        if self.prompt_format is None:
            raise TypeError("a task without classes has a prompt format")
        encode = encode_seq2seq if self.kind == "encoder-decoder" else encode_causal
        return encode(self.tokenizer, examples, self.prompt_format)


def _fit(
    rows: list[Encoded],
    config: DataConfig,
    kind: str,
    task: Task,
    positions: int | None,
    table: Table,
) -> Fitted:
    fitted = fit_rows(rows, config.max_length, positions, config.overlong, table.where)
    if kind != "encoder-decoder" or task.labelled:
        return fitted
    kept, dropped = fit_targets(fitted.rows, config.max_target_length, config.overlong, table.where)
    if not kept:
        raise InputError(f"no target is within {config.max_target_length:,} tokens.")
    return Fitted(kept, fitted.max_length, fitted.reason, fitted.dropped + dropped,
                  fitted.shortened, fitted.split)  # fmt: skip


def _check_vocabulary(rows: Sequence[Encoded], model: Any, table: Table) -> None:
    """Refuse ids beyond the embedding: the tokenizer is not the model's."""
    size = model.get_text_config().vocab_size
    worst = max(rows, key=lambda row: max(row.input_ids))
    highest = max(worst.input_ids)
    if highest >= size:
        raise InputError(
            f"{table.where(worst.row)} has token id {highest:,}, and the model's embedding has "
            f"{size:,} rows. The tokenizer is not this model's."
        )


def _facts(loaded: Loaded, train: Fitted, validation: Sequence[Encoded]) -> dict[str, Any]:
    return {
        "name": loaded.splits.name,
        "format": loaded.format.description,
        "train_rows": len(train.rows),
        "validation_rows": len(validation),
        "tokens": sum(len(row.input_ids) for row in train.rows),
        "supervised": sum(row.supervised for row in train.rows),
        "longest": max(len(row.input_ids) for row in train.rows),
        "max_length": train.max_length,
        "dropped": train.dropped + len(loaded.splits.train.dropped),
        "shortened": train.shortened,
        "split": train.split,
        "fingerprint": rows_fingerprint(loaded.splits.train.rows),
        "labels": list(loaded.labels.names) if loaded.labels else [],
    }


def _choices(
    loaded: Loaded,
    train: Fitted,
    validation: Sequence[Encoded],
    facts: dict[str, Any],
    prompt_format: PromptFormat | None,
) -> list[Choice]:
    held = (
        f"{len(validation):,} for validation"
        if validation
        else ("no validation rows: --validation-split 0.05 would hold some out")
    )
    tokens, supervised = facts["tokens"], facts["supervised"]
    choices = [
        Choice("data", loaded.splits.name, f"{len(train.rows):,} rows; {held}"),
        Choice("columns", loaded.format.description),
        Choice("max length", f"{train.max_length:,} tokens", train.reason),
    ]
    if loaded.labels is None:
        share = f"{supervised:,} supervised, {supervised / tokens:.0%}"
        choices.append(Choice("tokens", f"{tokens:,} an epoch", share))
    else:
        choices.append(Choice("labels", f"{len(loaded.labels)}", ", ".join(facts["labels"][:8])))
    if prompt_format is not None:
        choices.append(Choice("prompt", prompt_format.kind, prompt_format.instruction))
    for count, what in (
        (facts["dropped"], "dropped"),
        (train.shortened, "shortened at the beginning of the prompt"),
        (train.split, "split into several"),
    ):
        if count:
            choices.append(Choice("rows changed", f"{count:,} {what}"))
    return choices
