"""Load the splits of a dataset and convert their rows to examples, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.formats.convert import convert_rows, to_examples
from ftlevel.data.formats.detect import Format, explain_columns
from ftlevel.data.formats.labels import (
    LABEL_NORMALIZERS,
    LabelNormalizer,
    LabelSet,
    build_label_set,
    check_labels,
    find_invalid_labels,
    find_variants,
)
from ftlevel.data.gate import Finding, build_finding
from ftlevel.data.gate.gate import handle_unusable_rows
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.refused import refuse_media_columns
from ftlevel.data.sources.splits import DatasetSplits, hold_out, join_splits, load_splits
from ftlevel.data.sources.table import BadRow, Table, handle_bad_rows
from ftlevel.errors import InputError, did_you_mean, join_names, quote, reading
from ftlevel.task import Task

BUILTIN_ROWS = 192
"""Default number of training rows of a built-in dataset, for a quick first run."""


@dataclass(frozen=True)
class LoadedExamples:
    """Examples of all splits, before tokenization.

    Attributes:
        format: detected column format.
        labels: classes or tags, or None.
        choices: log lines about the columns.
        findings: rows without usable content.
        why: reason for the column format.
    """

    splits: DatasetSplits
    format: Format
    train: Sequence[Any]
    validation: Sequence[Any] | None
    labels: LabelSet | None
    choices: list[Choice] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    why: str = ""


def load_examples(
    config: DataConfig, task: Task, seed: int, *, lenient: bool = False
) -> LoadedExamples:
    """Read the dataset and convert its rows to examples of `task`.

    `seed` selects the validation rows. `lenient` drops and reports rows that would stop the run.

    Raises:
        InputError: with `path:line`, a row cannot be read or converted.
    """
    return convert_splits(read_splits(config, task, seed), config, task, lenient=lenient)


def convert_splits(
    splits: DatasetSplits, config: DataConfig, task: Task, *, lenient: bool
) -> LoadedExamples:
    """Convert the rows of `splits` to examples; arguments as in `load_examples`."""
    _check_ignored(splits, config)
    convert, told = open_converter(splits.train, config, task, lenient=lenient)
    choices = [*(Choice("note", note) for note in splits.notes), *told]
    train, examples = convert("train", splits.train, None)
    labels = None
    if convert.label_column is not None:
        examples = convert.merge_label_variants("train", train, examples, config.labels)
        labels = build_label_set(examples, train, convert.label_column, config.labels)
        train, examples = convert.drop_inconsistent_labels(train, examples, labels)
    validation, held_out = splits.validation, None
    if validation is not None:
        validation, held_out = convert.known("validation", validation, labels)
    kept = DatasetSplits(train, validation, splits.test, splits.name, splits.notes)
    reason = explain_columns(convert.shape.columns, config.columns, config.format)
    return LoadedExamples(
        kept, convert.shape, examples, held_out, labels, choices, convert.findings, reason
    )


def _check_ignored(splits: DatasetSplits, config: DataConfig) -> None:
    """Raise `InputError` if no split has a column of `--ignore-columns`."""
    tables = [table for table in (splits.train, splits.validation, splits.test) if table]
    known = {name for table in tables for name in table.ignored}
    if unknown := [name for name in config.ignore_columns if name not in known]:
        columns = splits.train.columns
        raise InputError(
            f"--ignore-columns {unknown[0]}: no such column.{did_you_mean(unknown[0], columns)} "
            f"Columns: {join_names(map(quote, columns))}."
        )


def open_converter(
    table: Table, config: DataConfig, task: Task, *, lenient: bool = False
) -> tuple[Converter, list[Choice]]:
    """Return a converter for rows like those of `table`, and log lines."""
    found = task.find_format(table.columns, config, table.rows[:CHUNK_ROWS])
    refuse_media_columns(found.unused, table.rows, table.source)
    shape, choices = task.read_columns(found, table, config)
    return Converter(config, task, shape, shape, lenient), choices


@dataclass
class Converter:
    """Converts tables to examples; `plain` is the detected format, `shape` adds label merging."""

    config: DataConfig
    task: Task
    plain: Format
    shape: Format
    lenient: bool
    findings: list[Finding] = field(default_factory=list)

    @property
    def label_column(self) -> str | None:
        """Column with the class labels, or None."""
        role = self.task.label_role(self.shape)
        return self.shape.columns[role] if role is not None else None

    def __call__(
        self, split: str, table: Table, labels: LabelSet | None
    ) -> tuple[Table, Sequence[Any]]:
        """Return the usable rows and their examples."""
        examples: Sequence[Any]
        examples, bad = convert_rows(table, self.shape)
        column = self.label_column
        if column is not None and (self.lenient or self.config.gate.unknown_label == "drop"):
            bad += find_invalid_labels(labels, examples, table, column)
        if not bad:
            return table, examples
        return self._without(split, table, bad)

    def known(
        self, split: str, table: Table, labels: LabelSet | None
    ) -> tuple[Table, Sequence[Any]]:
        """Convert a split whose classes must be in `labels`; raise `InputError` on others."""
        if labels is not None:
            self.merge_label_variants(
                split, table, convert_rows(table, self.plain)[0], labels.names
            )
        table, examples = self(split, table, labels)
        if labels is None:
            return table, examples
        check_labels(labels, examples, table)
        return self.drop_inconsistent_labels(table, examples, labels)

    def merge_label_variants(
        self, split: str, table: Table, examples: Sequence[Any], names: Sequence[str] = ()
    ) -> Sequence[Any]:
        """Return `examples` with spelling variants of a label merged.

        `names` are the known classes; if empty, the most frequent spelling is used.
        """
        for check, same in LABEL_NORMALIZERS.items():
            variants = find_variants(examples, check, names)
            rows = sorted({row for variant in variants for row in variant.rows})
            told = [f"{table.where(v.rows[0])}: {v.label!r} is {v.name!r}" for v in variants]
            found = build_finding(check, split, len(rows), len(table), told, self.config.gate)
            if found is None:
                continue
            self.findings.append(found)
            if found.action == "fold":
                known = {same(name): v.name for v in variants for name in (v.label, v.name)}
                self.shape = replace(
                    self.shape, build=LabelNormalizer(self.shape.build, same, known)
                )
                examples = convert_rows(table, self.shape)[0]
        return examples

    def drop_inconsistent_labels(
        self, table: Table, examples: Sequence[Any], labels: LabelSet
    ) -> tuple[Table, Sequence[Any]]:
        """Raise on rows with inconsistent classes, or drop them if configured."""
        faults = self.task.find_inconsistent_labels(examples, labels, table)
        if not faults:
            return table, examples
        table = handle_bad_rows(table, faults, self.config.on_bad_row)
        return table, to_examples(table, self.shape)

    def _without(self, split: str, table: Table, bad: list[BadRow]) -> tuple[Table, Sequence[Any]]:
        table, found = handle_unusable_rows(table, bad, self.config, split, lenient=self.lenient)
        self.findings += found
        return table, to_examples(table, self.shape)


def read_splits(config: DataConfig, task: Task, seed: int) -> DatasetSplits:
    """Return the splits after joining, holding out and sampling as configured."""
    parts = [_read_one(name, config, task, config.split) for name in (config.dataset, *config.also)]
    splits = parts[0] if len(parts) == 1 else join_splits(parts, config.mix, seed)
    if config.validation_file is not None:
        splits = replace(
            splits, validation=_read_one(config.validation_file, config, task, None).train
        )
    if config.validation_split:
        splits = hold_out(splits, config.validation_split, seed)
    train, validation = splits.train, splits.validation
    if config.max_samples and config.max_samples < len(train):
        train = replace(train.take(range(config.max_samples)), dropped=train.dropped)
    if validation is not None and config.max_eval_samples:
        validation = validation.take(range(min(len(validation), config.max_eval_samples)))
    return DatasetSplits(train, validation, splits.test, splits.name, splits.notes)


def _read_one(name: str, config: DataConfig, task: Task, split: str | None) -> DatasetSplits:
    builtin = name.startswith("builtin:")
    with reading(name):
        return load_splits(
            name,
            split=split,
            subset=config.subset or (task.builtin_subset or None if builtin else None),
            on_bad_row=config.on_bad_row,
            max_samples=BUILTIN_ROWS if builtin and config.max_samples is None else None,
            input_format=config.input_format,
            ignored=config.ignore_columns,
        )
