"""The rows that a trained model is scored on, encoded as training encodes its validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.prompts import read_format
from ftlevel.data.formats.columns import is_there
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.prepare.context import EncodingContext
from ftlevel.data.prepare.encoder import Encoder
from ftlevel.data.prepare.loading import open_converter, read_splits
from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.splits import Splits
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.task import Task

_DEFAULT_SPLIT = "validation"
TRAINING_ROWS = "the training rows: no validation split was held back"
"""What the rows are called that a model learned from, where there are no others."""


@dataclass(frozen=True)
class HeldOut:
    """Rows to score.

    Attributes:
        table: the rows as they were read.
        rows: encoded.
        split: which split they are.
        dropped: how many rows were too long.
        language: ISO 639-1 code of the target; "" if unknown.
        source: name of the data set.
        note: what its columns are, where they are not those of training.
        columns: what they are used for.
    """

    table: Table
    rows: Sequence[Encoded]
    split: str
    dropped: int
    language: str
    source: str
    note: str = ""
    columns: str = ""

    @property
    def is_training(self) -> bool:
        """Whether the model learned from them, and nothing else was held back."""
        return self.split == TRAINING_ROWS


def load_held_out(
    config: DataConfig,
    card: AdapterCard,
    split: str | None,
    context: EncodingContext,
    *,
    is_own: bool = False,
    is_typed: bool = True,
) -> HeldOut:
    """Read and encode the rows to score.

    Args:
        config: where the rows are, and how training cut them.
        card: of what is scored: its task, prompt, labels.
        split: as wished; None takes validation, or a file as a whole.
        context: of the model; its seed is that of the training, which held rows out.
        is_own: whether the data is what the model was trained on.
        is_typed: whether the names of the columns are the user's word, and not the training's.

    Raises:
        InputError: there are no such rows, or they are not of the task.
    """
    task = context.task
    fields = DataConfig.model_fields
    known = {name: value for name, value in card.options.items() if name in fields}
    config = config.model_copy(update=known)  # what training found out
    splits = read_splits(config, task, context.seed)
    table, name = _choose(splits, split, is_own=is_own)
    if config.max_eval_samples is not None:
        table = table.take(range(min(len(table), config.max_eval_samples)))
    note = ""
    if not (is_own or is_typed):
        config, note = _without_absent(config, table, task)
    convert, _ = open_converter(table, config, task)
    labels = LabelSet(tuple(card.labels)) if card.labels else None
    table, examples = convert.known(name, table, labels)
    prompt = read_format(card)
    if prompt is not None and not card.data:  # not trained here: these rows decide
        prompt = prompt.for_rows(examples, prompt.version)
    encoder = Encoder(
        task, context.kind, context.tokenizer, config, context.bounds, prompt, labels
    ).holding_out(name)
    # Training's own rows are cut as training cut them; its length says nothing of others.
    encoder = replace(encoder, whole=name != "validation")
    fitted = encoder(examples, table)
    rows: Sequence[Encoded] = fitted.rows
    if name == "validation":  # as training let them through
        _, learned = convert("train", splits.train, labels)
        rows, found = context.gate(config.gate).check_held_out(
            name, fitted, examples, table, encoder.digest(learned)
        )
        if not len(rows):
            raise InputError(
                f"no {name} row of {splits.name} is left to score: {'; '.join(map(str, found))}. "
                "Name other rows with --dataset, or --split train."
            )
    rows = task.fix(rows, config, context)
    language = convert.shape.options.get("target_language", "")
    used = convert.shape.description
    return HeldOut(table, rows, name, fitted.dropped, language, splits.name, note, used)


def _without_absent(config: DataConfig, table: Table, task: Task) -> tuple[DataConfig, str]:
    """Return `config` with the training's words on columns as far as `table` has them; and a note.

    What the training was told of its own columns must not be held against other rows.
    """
    there = {
        role: column for role, column in config.columns.items() if is_there(column, table.columns)
    }
    for columns, form in ((config.columns, config.format), (there, config.format), (there, None),
                          ({}, None)):  # fmt: skip
        fewer = config.model_copy(update={"columns": columns, "format": form})
        try:
            found = task.find_format(table.columns, fewer, table.rows[:PART])
        except InputError:
            continue
        if fewer == config:
            break
        return fewer, f"{found.description}; the training's own --map and --format do not fit these"
    else:
        return fewer, ""  # what is wrong is said of the columns
    return config, ""


def _choose(splits: Splits, split: str | None, *, is_own: bool) -> tuple[Table, str]:
    """Return the table of `split`, and what it is called."""
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    there = [name for name, table in tables.items() if table is not None]
    if split is None and there == ["train"]:
        return splits.train, TRAINING_ROWS if is_own else "all rows"
    name = split or _DEFAULT_SPLIT
    table = tables[name]
    if table is None:
        raise InputError(
            f"--split {name}: {splits.name} has none. Splits here: {', '.join(there)}. Name "
            "another, or other rows with --dataset."
        )
    return table, name
