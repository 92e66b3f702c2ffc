"""Read rows for prediction, and rows to evaluate a trained model on.

Prediction converts rows like training does, but drops none: an invalid row has an error message.
Evaluation rows are encoded like the validation rows of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, TypeAlias

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.files import rows_fingerprint
from ftlevel.config import DataConfig
from ftlevel.data.encoding.prompts import load_prompt_format
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.columns import columns_exist
from ftlevel.data.formats.detect import Format, RoleValues
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.formats.turns import UnusableRowError
from ftlevel.data.gate import explain_stop
from ftlevel.data.prepare.encoder import DataTask, EncodingContext
from ftlevel.data.prepare.loading import eval_converter, open_converter, read_splits
from ftlevel.data.sources.hub import iterate_rows
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers import ReadOptions, is_pattern, match_files, open_reader
from ftlevel.data.sources.splits import DatasetSplits
from ftlevel.data.sources.streams import Reader
from ftlevel.data.sources.table import Row, Table, check_same_columns
from ftlevel.errors import InputError, join_names, quote


@dataclass(frozen=True)
class QueryRow:
    """A row for prediction.

    Attributes:
        row: the row as read; all values are null if it could not be read.
        location: `file:line`.
        question: example for the task's `predict`; None if the row is invalid.
        fault: error message without a final period.
        share: fraction of the source read so far, from 0 to 1, if available.
    """

    row: Row
    location: str
    question: Any
    fault: str
    share: float | None


Item: TypeAlias = tuple[Row | None, str, str, float | None]
"""A row (None if unreadable), its `file:line`, an error message, and the share read so far."""


@dataclass(frozen=True)
class RowSource:
    """Rows of files or of Python objects, to be read one by one.

    Attributes:
        column_names: column names, from the schema or the first rows.
        leading: columns of the first row, from which the format is detected.
        read: yields the rows from the beginning.
        schema: Arrow schema if the source declares types, else None.
        text_cells: whether cells are text only, as in CSV.
    """

    column_names: Sequence[str]
    leading: Sequence[str]
    first: Sequence[Row]
    read: Callable[[], Iterator[Item]]
    schema: Any = None
    text_cells: bool = False


def open_rows(name: str, options: ReadOptions) -> tuple[RowSource, Reader]:
    """Returns the rows of the file `name`, or of all files if `name` is a glob pattern.

    Also returns the reader of the first file. Raises `InputError` if a file cannot be read, or the
    columns of two files differ.
    """
    names = match_files(name, options.format) if is_pattern(name) else [name]
    readers = [open_reader(each, options) for each in names]
    sources = [file_rows(reader, options.ignored) for reader in readers]
    first = sources[0]
    if len(sources) == 1:
        return first, readers[0]
    for reader, source in zip(readers, sources, strict=True):
        check_same_columns(
            (reader.shown, source.column_names),
            (readers[0].shown, first.column_names),
            "Files that are read",
        )

    def read() -> Iterator[Item]:
        for number, source in enumerate(sources):
            for row, location, fault, share in source.read():
                done = None if share is None else (number + share) / len(sources)
                yield row, location, fault, done

    schema = first.schema if all(source.schema is not None for source in sources) else None
    text_cells = all(source.text_cells for source in sources)
    return replace(first, read=read, schema=schema, text_cells=text_cells), readers[0]


def file_rows(reader: Reader, ignored: Sequence[str] = ()) -> RowSource:
    """Returns the rows of a file; columns in `ignored` do not count for detecting the format.

    Raises `InputError` if the first chunk of the file has no valid row.
    """

    def place(line: int) -> str:
        return Table([], [], reader.shown, reader.unit).location(line)

    def read() -> Iterator[Item]:
        for chunk in reader.chunks():
            share = reader.share(chunk)
            items: list[tuple[int, Row | None, str]] = [
                *((line, row, "") for line, row in zip(chunk.lines, chunk.rows, strict=True)),
                *((error.line, None, error.message) for error in chunk.errors),
            ]
            for line, row, fault in sorted(items, key=lambda item: item[0]):
                yield row, place(line), fault, share

    chunk = next(reader.chunks(), None)
    if chunk is None or not (chunk.rows or chunk.errors):
        raise InputError(f"{reader.shown}: has 0 rows. Use a file with rows.")
    if not chunk.rows:
        error = chunk.errors[0]
        raise InputError(f"{place(error.line)}: {error.message}. Fix the file.")
    declared = reader.schema.names if reader.schema is not None else []
    column_names = declared or list(dict.fromkeys(name for row in chunk.rows for name in row))
    leading = [name for name in chunk.rows[0] if name not in ignored]
    return RowSource(column_names, leading, chunk.rows, read, reader.schema, reader.text_cells)


def in_memory_rows(rows: Any, ignored: Sequence[str] = ()) -> RowSource:
    """Returns rows, of a type that `iterate_rows` accepts, as a source that is read only once."""
    rest = iterate_rows(rows, "predict")
    first = list(islice(rest, CHUNK_ROWS))
    if not first:
        raise InputError("there are 0 rows to predict. Pass at least one.")

    def read() -> Iterator[Item]:
        for number, row in enumerate(chain(first, rest), 1):
            yield row, f"row {number}", "", None

    column_names = list(dict.fromkeys(name for row in first for name in row))
    return RowSource(column_names, [name for name in first[0] if name not in ignored], first, read)


@dataclass(frozen=True)
class Prompts:
    """Up to `limit` rows as `QueryRow`; if `fixed`, a row with new columns is invalid."""

    source: RowSource
    shape: Format
    fixed: bool = False
    limit: int | None = None

    def __iter__(self) -> Iterator[QueryRow]:
        column_names = dict.fromkeys(self.source.column_names)
        values = RoleValues(self.shape, Table([], [], "", text_cells=self.source.text_cells))
        for row, location, fault, share in islice(self.source.read(), self.limit):
            question = None
            if row is None:
                row = dict(column_names)
            elif self.fixed and not row.keys() <= column_names.keys():
                more = join_names(quote(name) for name in row if name not in column_names)
                fault = f"has {more}, which the first rows lack"
            else:
                values.set_row(row, 0)
                try:
                    question = self.shape.build(values)
                except UnusableRowError as error:
                    fault = str(error)
            yield QueryRow(row, location, question, fault, share)


def windows(rows: Iterator[QueryRow], size: int) -> Iterator[list[QueryRow]]:
    """Yields lists of `size` rows; the last list may be shorter."""
    while window := list(islice(rows, size)):
        yield window


TRAINING_ROWS = "the training rows: no validation split was held out"
ALL_ROWS = "all rows, including those of training"
"""Names of rows that include those of training; the first if there are no other rows."""


@dataclass(frozen=True)
class EvaluationRows:
    """Encoded rows to evaluate, and the facts about them.

    Attributes:
        dropped: number of rows that were too long.
        language: ISO 639-1 code of the target; "" if unknown.
        note: columns used, if they differ from training.
        corpus: documents that queries search; if empty, the documents of `rows`.
        changed: split whose rows or corpus differ from those that the card records; "" for none.
        options: the card's options, updated for these rows.
    """

    table: Table
    rows: Sequence[Encoded]
    split: str
    dropped: int
    language: str
    source: str
    note: str
    columns: str
    corpus: Sequence[Encoded]
    changed: str
    options: Mapping[str, Any]

    @property
    def is_training(self) -> bool:
        """Whether these are training rows."""
        return self.split in (TRAINING_ROWS, ALL_ROWS)


def load_evaluation_rows(
    config: DataConfig,
    card: AdapterCard,
    split: str | None,
    context: EncodingContext,
    *,
    is_own: bool,
    is_typed: bool,
) -> EvaluationRows:
    """Load and encode the rows to evaluate.

    `config` has the dataset to evaluate and the length settings of training, `context` the training
    seed, which determines the validation split, `card` other settings of the model. A `split` of
    None is validation, or all rows if there is one split. `is_own`: the dataset is the one used in
    training; `is_typed`: the user chose the column mapping. Raises `InputError` if there are no
    such rows, or they do not fit the task.
    """
    task = context.task
    options = {k: v for k, v in card.options.items() if k in DataConfig.model_fields}
    config = config.model_copy(update=options)  # resolved by training
    splits = read_splits(config, task, context.seed)
    held_out = bool(card.data.get("validation_fingerprint"))
    table, name = _choose(splits, split, ALL_ROWS if held_out else TRAINING_ROWS, is_own=is_own)
    if name != "validation" and config.qrels is not None:  # only validation queries are judged
        config, splits = config.model_copy(update={"qrels": None}), replace(splits, corpus=None)
    if config.max_eval_samples is not None:
        table = table.head(config.max_eval_samples)
    held_out_file = config.validation_file if name == "validation" else None
    source = str(config.qrels or held_out_file or splits.name)
    message = ""
    if not (is_own or is_typed):
        config, message = _without_absent(config, table, task)
    convert = open_converter(splits.train if config.qrels else table, config, task)[0]
    convert_training, convert = convert, eval_converter(convert, table)
    labels = LabelSet(tuple(card.labels)) if card.labels else None
    table, examples = convert.convert_held_out(name, table, labels)
    prompt = load_prompt_format(card)
    if prompt is not None and not card.data:  # not trained by ftlevel: infer the separator
        prompt = prompt.resolve_separator(examples)
    # The length limit of training applies only to its own validation rows.
    options = {"labels": labels, "ignore_max_length": name != "validation"}
    encoder = context.encoder(config, prompt, **options).for_held_out(name)
    fitted = encoder(examples, table)
    rows: Sequence[Encoded] = fitted.rows
    changed = ""
    if name == "validation":  # same checks as in training
        train_table, training = convert_training("train", splits.train, labels)
        if is_own and not is_typed:
            changed = _changed_split(card, replace(splits, train=train_table, validation=table))
        rows, findings = context.gate(config.gate).check_held_out(
            name, fitted, examples, table, encoder.digest(training)
        )
        if not len(rows):
            raise InputError(
                f"no {name} row of {source} is left to score: "
                f"{'; '.join(map(str, findings))}. Name other rows with --dataset, or --split "
                "train."
            )
    for finding in context.gate(config.gate).check_eval_set([], examples, splits.corpus, table):
        if finding.action == "stop":
            raise InputError(explain_stop(finding, "train with"))
    rows = task.evaluation_rows(rows, config, context)
    corpus: Sequence[Encoded] = ()
    if splits.corpus is not None:
        corpus, _ = task.encode_corpus(encoder, splits.corpus)
    language = convert.shape.options.get("target_language", "")
    used = convert.shape.description
    return EvaluationRows(
        table,
        rows,
        name,
        fitted.dropped,
        language,
        source,
        message,
        used,
        corpus,
        changed,
        task.options_for_rows(card.options, examples),
    )


def _changed_split(card: AdapterCard, splits: DatasetSplits) -> str:
    """Returns "train" or "validation" if its fingerprint differs from that in `card`, else ""."""
    train, validation = rows_fingerprint(splits.train.rows), splits.validation_fingerprint
    if (card.data.get("fingerprint") or train) != train:
        return "train"
    return "validation" if card.data.get("validation_fingerprint", validation) != validation else ""


def _without_absent(config: DataConfig, table: Table, task: DataTask) -> tuple[DataConfig, str]:
    present = {
        role: column
        for role, column in config.columns.items()
        if columns_exist(column, table.column_names)
    }
    choices = ((config.columns, config.format), (present, config.format), (present, None))
    for columns, format_ in (*choices, ({}, None)):
        reduced = config.model_copy(update={"columns": columns, "format": format_})
        try:
            detected = task.get_format(table.column_names, reduced, table.rows[:CHUNK_ROWS])
        except InputError:
            continue
        message = f"{detected.description}; the training's own --map and --format do not fit these"
        return reduced, "" if reduced == config else message
    return reduced, ""  # errors then refer to the actual columns


def _choose(
    splits: DatasetSplits, split: str | None, training_rows: str, *, is_own: bool
) -> tuple[Table, str]:
    tables = splits.tables
    if split is None and list(tables) == ["train"]:
        return splits.train, training_rows if is_own else "all rows"
    name = split or "validation"
    if name not in tables:
        raise InputError(
            f"--split {name}: {splits.name} has none. Splits here: {', '.join(tables)}. Choose "
            "another, or other rows with --dataset."
        )
    return tables[name], name
