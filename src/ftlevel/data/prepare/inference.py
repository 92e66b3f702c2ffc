"""Read rows for prediction, and rows to evaluate a trained model on.

Prediction converts rows like training does, but drops none: an invalid row has an error message.
Evaluation rows are encoded like the validation rows of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import Encoded, read_format
from ftlevel.data.formats.columns import columns_exist
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import RoleValues
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.formats.turns import UnusableRowError
from ftlevel.data.prepare.encoder import Encoder, EncodingContext
from ftlevel.data.prepare.loading import open_converter, read_splits
from ftlevel.data.sources.hub import iterate_rows
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.files import ReadOptions, is_pattern, match_files, open_reader
from ftlevel.data.sources.splits import DatasetSplits
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, join_names, quote
from ftlevel.task import Task

_FIRST = 64  # rows used to detect the columns


@dataclass(frozen=True)
class QueryRow:
    """A row for prediction.

    Attributes:
        row: the row as read; all values are null if it could not be read.
        place: `file:line`.
        question: model input, as built by the task; None if the row is invalid.
        fault: error message without a final period.
        share: fraction of the source read so far, from 0 to 1, if known.
    """

    row: Row
    place: str
    question: Any = None
    fault: str = ""
    share: float | None = None


class RowSource(Protocol):
    """Source of rows.

    Attributes:
        columns: column names, from the schema or the first rows.
        leading: columns of the first row, from which the format is detected.
        schema: Arrow schema if the source declares types, else None.
    """

    columns: Sequence[str]
    leading: Sequence[str]
    first: Sequence[Row]
    schema: Any

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield each row (None if unreadable), its location, error message and progress."""


class FileRows:
    """Rows of a file; creation reads the first rows and raises `InputError` if it cannot."""

    def __init__(self, reader: Reader, ignored: Sequence[str] = ()) -> None:
        self._reader = reader
        self.schema = reader.schema
        self.columns: Sequence[str] = self.schema.names if self.schema is not None else []
        chunk = next(self._reader.chunks(), None)
        if chunk is None or not (chunk.rows or chunk.bad):
            raise InputError(f"{reader.shown}: has 0 rows. Use a file with rows.")
        if not chunk.rows:
            first = chunk.bad[0]
            raise InputError(f"{self._place(chunk, first.line)}: {first.reason}. Fix the file.")
        if not self.columns:
            self.columns = list(dict.fromkeys(name for row in chunk.rows for name in row))
        self.leading: Sequence[str] = [name for name in chunk.rows[0] if name not in ignored]
        self.first: Sequence[Row] = chunk.rows

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield rows and unreadable locations in file order."""
        for chunk in self._reader.chunks():
            share = self._reader.share(chunk)
            found: list[tuple[int, Row | None, str]] = [
                *((line, row, "") for line, row in zip(chunk.lines, chunk.rows, strict=True)),
                *((bad.line, None, bad.reason) for bad in chunk.bad),
            ]
            for line, row, fault in sorted(found, key=lambda item: item[0]):
                yield row, self._place(chunk, line), fault, share

    def _place(self, chunk: Chunk, line: int) -> str:
        return Table([], [], self._reader.shown, chunk.unit).place(line)


class ChainedRows:
    """Rows of several files in sequence; raises `InputError` if their columns differ."""

    def __init__(self, files: Sequence[FileRows], names: Sequence[str]) -> None:
        self._files, first = files, files[0]
        self.columns, self.leading, self.first = first.columns, first.leading, first.first
        self.schema = first.schema if all(file.schema is not None for file in files) else None
        for file, name in zip(files, names, strict=True):
            if set(file.columns) != set(first.columns):
                raise InputError(
                    f"{name}: has the columns {join_names(map(quote, file.columns))}, and "
                    f"{names[0]} "
                    f"has {join_names(map(quote, first.columns))}. Files that are read together "
                    "need "
                    "the same columns."
                )

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows in the order of the files."""
        for number, file in enumerate(self._files):
            for row, place, fault, share in file.read():
                done = None if share is None else (number + share) / len(self._files)
                yield row, place, fault, done


def open_rows(name: str, how: ReadOptions) -> tuple[RowSource, Reader]:
    """Return the rows of a file or of all files matching a pattern, and the first reader."""
    names = match_files(name, how.format) if is_pattern(name) else [name]
    readers = [open_reader(each, how) for each in names]
    files = [FileRows(reader, how.ignored) for reader in readers]
    shown = [reader.shown for reader in readers]
    return (files[0] if len(files) == 1 else ChainedRows(files, shown)), readers[0]


class InMemoryRows:
    """Rows in memory, of any type that `iterate_rows` accepts; raises `InputError` if empty."""

    schema = None

    def __init__(self, rows: Any, ignored: Sequence[str] = ()) -> None:
        self._rows = iterate_rows(rows, "predict")
        self.first: Sequence[Row] = list(islice(self._rows, _FIRST))
        if not self.first:
            raise InputError("there are 0 rows to predict. Give some.")
        self.columns: Sequence[str] = list(dict.fromkeys(n for row in self.first for n in row))
        self.leading: Sequence[str] = [name for name in self.first[0] if name not in ignored]

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows; a second call yields only the first ones."""
        for number, row in enumerate(self.first, 1):
            yield row, f"row {number}", "", None
        for number, row in enumerate(self._rows, len(self.first) + 1):
            yield row, f"row {number}", "", None


@dataclass(frozen=True)
class Prompts:
    """Rows of a source converted to model inputs, at most `limit` of them.

    If `fixed` is true, rows may not have columns that the first rows lack.
    """

    source: RowSource
    shape: Format
    fixed: bool = False
    limit: int | None = None

    def __iter__(self) -> Iterator[QueryRow]:
        known = frozenset(self.source.columns)
        roles = RoleValues(self.shape, Table([], [], ""))
        for row, place, fault, share in islice(self.source.read(), self.limit):
            yield replace(self._ask(row, place, fault, roles, known), share=share)

    def _ask(
        self, row: Row | None, place: str, fault: str, roles: RoleValues, known: frozenset[str]
    ) -> QueryRow:
        if row is None:
            return QueryRow(dict.fromkeys(self.source.columns), place, None, fault)
        if self.fixed and not row.keys() <= known:
            more = join_names(quote(name) for name in row if name not in known)
            return QueryRow(row, place, None, f"has {more}, which the first rows lack")
        roles.set_row(row, 0)
        try:
            return QueryRow(row, place, self.shape.build(roles))
        except UnusableRowError as error:
            return QueryRow(row, place, None, str(error))


def windows(rows: Iterator[QueryRow], size: int) -> Iterator[list[QueryRow]]:
    """Yield lists of `size` rows; the last list may be shorter."""
    while window := list(islice(rows, size)):
        yield window


_DEFAULT_SPLIT = "validation"
TRAINING_ROWS = "the training rows: no validation split was held out"
"""Name of the training rows if there are no other rows to evaluate."""


@dataclass(frozen=True)
class EvaluationRows:
    """Rows to evaluate.

    Attributes:
        dropped: number of rows that were too long.
        language: ISO 639-1 code of the target; "" if unknown.
        source: name of the dataset.
        note: columns used, if they differ from training.
        columns: description of the column format.
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
        """Whether these are training rows, because no validation rows exist."""
        return self.split == TRAINING_ROWS


def load_evaluation_rows(
    config: DataConfig,
    card: AdapterCard,
    split: str | None,
    context: EncodingContext,
    *,
    is_own: bool = False,
    is_typed: bool = True,
) -> EvaluationRows:
    """Read and encode the rows to evaluate.

    Args:
        config: data section, with the dataset to evaluate and the length settings of training.
        card: adapter card with the task, prompt format and labels.
        split: split to evaluate; None is validation, or all rows if there is one split.
        context: encoding context with the seed of training, which determines the validation split.
        is_own: whether the dataset is the one used in training.
        is_typed: whether the user, not the training run, chose the column mapping.

    Raises:
        InputError: there are no such rows, or they do not fit the task.
    """
    task = context.task
    fields = DataConfig.model_fields
    known = {name: value for name, value in card.options.items() if name in fields}
    config = config.model_copy(update=known)  # options resolved by training
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
    if prompt is not None and not card.data:  # not trained by ftlevel: infer the separator
        prompt = prompt.resolve_separator(examples, prompt.version)
    encoder = Encoder(
        task, context.kind, context.tokenizer, config, context.bounds, prompt, labels
    ).for_held_out(name)
    # The length limit of training applies only to its own validation rows.
    encoder = replace(encoder, whole=name != "validation")
    fitted = encoder(examples, table)
    rows: Sequence[Encoded] = fitted.rows
    if name == "validation":  # same checks as in training
        _, learned = convert("train", splits.train, labels)
        rows, found = context.gate(config.gate).check_held_out(
            name, fitted, examples, table, encoder.digest(learned)
        )
        if not len(rows):
            raise InputError(
                f"no {name} row of {splits.name} is left to score: {'; '.join(map(str, found))}. "
                "Name other rows with --dataset, or --split train."
            )
    rows = task.evaluation_rows(rows, config, context)
    language = convert.shape.options.get("target_language", "")
    used = convert.shape.description
    return EvaluationRows(table, rows, name, fitted.dropped, language, splits.name, note, used)


def _without_absent(config: DataConfig, table: Table, task: Task) -> tuple[DataConfig, str]:
    """Drop the column mapping and format of training if they do not fit `table`; return a note."""
    there = {
        role: column
        for role, column in config.columns.items()
        if columns_exist(column, table.columns)
    }
    for columns, form in (
        (config.columns, config.format),
        (there, config.format),
        (there, None),
        ({}, None),
    ):
        fewer = config.model_copy(update={"columns": columns, "format": form})
        try:
            found = task.find_format(table.columns, fewer, table.rows[:CHUNK_ROWS])
        except InputError:
            continue
        if fewer == config:
            break
        return fewer, f"{found.description}; the training's own --map and --format do not fit these"
    else:
        return fewer, ""  # errors then refer to the actual columns
    return config, ""


def _choose(splits: DatasetSplits, split: str | None, *, is_own: bool) -> tuple[Table, str]:
    """Return the table of `split`, and its name."""
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    there = [name for name, table in tables.items() if table is not None]
    if split is None and there == ["train"]:
        return splits.train, TRAINING_ROWS if is_own else "all rows"
    name = split or _DEFAULT_SPLIT
    table = tables[name]
    if table is None:
        raise InputError(
            f"--split {name}: {splits.name} has none. Splits here: {', '.join(there)}. Choose "
            "another, or other rows with --dataset."
        )
    return table, name
