"""Rows without an answer as they come: each with its place, and what the task asks of it.

The same way as of a row that is learned from, as far as it goes: source, format, example. Nothing
is left out: a row that cannot be asked about has its reason instead.

The rows that a trained model is scored on, encoded as training encodes its validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import Encoded, read_format
from ftlevel.data.formats.columns import is_there
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import Roles
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.formats.turns import Unusable
from ftlevel.data.prepare.encoder import Encoder, EncodingContext
from ftlevel.data.prepare.loading import open_converter, read_splits
from ftlevel.data.sources.hub import iterate_rows
from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.files import Reading, is_pattern, match_files, open_reader
from ftlevel.data.sources.splits import Splits
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, listing, quote
from ftlevel.task import Task

_FIRST = 64  # rows by which the columns are known


@dataclass(frozen=True)
class AskedRow:
    """A row.

    Attributes:
        row: as it was read; of a place that gave no row, null in every column.
        place: `file:line`.
        question: what the task makes of it; None where it cannot.
        fault: why not, without a full stop.
        share: which part of the source is read behind it, from 0 to 1, where that is known.
    """

    row: Row
    place: str
    question: Any = None
    fault: str = ""
    share: float | None = None


class RowSource(Protocol):
    """Where rows come from.

    Attributes:
        columns: names, by the first rows.
        leading: those of the first row, by which it is known what to ask.
        first: the first rows.
        schema: Arrow's, where the types are declared; else None.
    """

    columns: Sequence[str]
    leading: Sequence[str]
    first: Sequence[Row]
    schema: Any

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield each row, its place, what is wrong with it, and which part is read behind it."""


class FileRows:
    """The rows of a file; the first are read when it is made, to know its columns.

    Args:
        reader: of the file.
        ignored: columns that are not asked about.

    Raises:
        InputError: it is not there, of no known format, damaged or empty.
    """

    def __init__(self, reader: Reader, ignored: Sequence[str] = ()) -> None:
        self._reader = reader
        self.schema = reader.schema
        self.columns: Sequence[str] = self.schema.names if self.schema is not None else []
        chunk = next(self._reader.chunks(), None)
        if chunk is None or not (chunk.rows or chunk.bad):
            raise InputError(f"{reader.shown}: has 0 rows. Give a file with rows.")
        if not chunk.rows:
            first = chunk.bad[0]
            raise InputError(f"{self._place(chunk, first.line)}: {first.reason}. Fix the file.")
        if not self.columns:
            self.columns = list(dict.fromkeys(name for row in chunk.rows for name in row))
        self.leading: Sequence[str] = [name for name in chunk.rows[0] if name not in ignored]
        self.first: Sequence[Row] = chunk.rows

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows in the order of the file, a place that gave none at its own."""
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
    """The rows of several files, one after the other.

    Raises:
        InputError: their columns differ.
    """

    def __init__(self, files: Sequence[FileRows], names: Sequence[str]) -> None:
        self._files, first = files, files[0]
        self.columns, self.leading, self.first = first.columns, first.leading, first.first
        self.schema = first.schema if all(file.schema is not None for file in files) else None
        for file, name in zip(files, names, strict=True):
            if set(file.columns) != set(first.columns):
                raise InputError(
                    f"{name}: has the columns {listing(map(quote, file.columns))}, and {names[0]} "
                    f"has {listing(map(quote, first.columns))}. Files that are read together need "
                    "the same columns."
                )

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows in the order of the files."""
        for number, file in enumerate(self._files):
            for row, place, fault, share in file.read():
                done = None if share is None else (number + share) / len(self._files)
                yield row, place, fault, done


def open_rows(name: str, how: Reading) -> tuple[RowSource, Reader]:
    """Return the rows of a file, or of all files that a pattern matches, and the first file.

    Raises:
        InputError: as of `open_reader` and `match_files`.
    """
    names = match_files(name, how.format) if is_pattern(name) else [name]
    readers = [open_reader(each, how) for each in names]
    files = [FileRows(reader, how.ignored) for reader in readers]
    shown = [reader.shown for reader in readers]
    return (files[0] if len(files) == 1 else ChainedRows(files, shown)), readers[0]


class GivenRows:
    """Rows that a program hands over, as of `iterate_rows`.

    Args:
        rows: the rows.
        ignored: columns that are not asked about.

    Raises:
        InputError: there are none.
    """

    schema = None

    def __init__(self, rows: Any, ignored: Sequence[str] = ()) -> None:
        self._rows = iterate_rows(rows, "predict")
        self.first: Sequence[Row] = list(islice(self._rows, _FIRST))
        if not self.first:
            raise InputError("there are 0 rows to predict. Give some.")
        self.columns: Sequence[str] = list(dict.fromkeys(n for row in self.first for n in row))
        self.leading: Sequence[str] = [name for name in self.first[0] if name not in ignored]

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows, once."""
        for number, row in enumerate(self.first, 1):
            yield row, f"row {number}", "", None
        for number, row in enumerate(self._rows, len(self.first) + 1):
            yield row, f"row {number}", "", None


@dataclass(frozen=True)
class Questions:
    """The rows of a source as a task asks them.

    Attributes:
        source: where they come from.
        shape: what the columns are.
        fixed: whether a row may have no column beside those of the first ones.
        limit: how many rows there are at most.
    """

    source: RowSource
    shape: Format
    fixed: bool = False
    limit: int | None = None

    def __iter__(self) -> Iterator[AskedRow]:
        """Yield all rows in order."""
        known = frozenset(self.source.columns)
        roles = Roles(self.shape, Table([], [], ""))
        for row, place, fault, share in islice(self.source.read(), self.limit):
            yield replace(self._ask(row, place, fault, roles, known), share=share)

    def _ask(
        self, row: Row | None, place: str, fault: str, roles: Roles, known: frozenset[str]
    ) -> AskedRow:
        if row is None:
            return AskedRow(dict.fromkeys(self.source.columns), place, None, fault)
        if self.fixed and not row.keys() <= known:
            more = listing(quote(name) for name in row if name not in known)
            return AskedRow(row, place, None, f"has {more}, which the first rows lack")
        roles.turn_to(row, 0)
        try:
            return AskedRow(row, place, self.shape.build(roles))
        except Unusable as error:
            return AskedRow(row, place, None, str(error))


def windows(rows: Iterator[AskedRow], size: int) -> Iterator[list[AskedRow]]:
    """Yield `rows` in lists of `size`; the last one may be shorter."""
    while window := list(islice(rows, size)):
        yield window


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
