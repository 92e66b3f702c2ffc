"""Load the splits of a dataset: built-in, local, in memory or from the Hub; join and split tables.

`join_tables` and `mix_tables` combine datasets without repeating a row. Rows are interleaved
evenly, so the first N rows are a fair sample. `formats` interprets the columns.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftlevel.config import IN_MEMORY, InMemoryDataset
from ftlevel.data.sources.hub import (
    is_saved_directory,
    load_hub_tables,
    load_memory_tables,
    load_saved_tables,
    pick_split,
)
from ftlevel.data.sources.lines import STDIN
from ftlevel.data.sources.readers.files import (
    ReadOptions,
    data_files,
    is_data_file_name,
    is_pattern,
    match_files,
    read_table,
    stem_of,
)
from ftlevel.data.sources.readers.refused import describe_missing
from ftlevel.data.sources.table import BadRow, OnBadRow, Part, Table, describe_dropped
from ftlevel.errors import InputError, closest_matches, did_you_mean, join_names, quote


def join_tables(tables: Sequence[Table]) -> Table:
    """Return one table with the interleaved rows of `tables`; their columns must be the same."""
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for other in tables[1:]:
        if set(other.columns) != set(first.columns):
            raise InputError(
                f"{other.source}: has the columns {_quoted(other)}, and {first.source} has "
                f"{_quoted(first)}. Data sets that are trained on together need the same columns."
            )
        for column in first.label_names.keys() & other.label_names.keys():
            own, expected = other.label_names[column], first.label_names[column]
            if own != expected:
                raise InputError(
                    f"{other.source}: the classes of {column!r} are {join_names(own)}, and those "
                    f"of {first.source} are {join_names(expected)}. Their numbers mean different "
                    "classes. Write class names instead of numbers, or give both the same order."
                )
    parts, base = [], 0
    dropped: list[BadRow] = []
    lines: list[list[int]] = []
    for table in tables:
        parts.append(Part(base, table))
        lines.append([base + line for line in table.lines])
        dropped += [replace(row, line=base + row.line) for row in table.dropped]
        base += max([*table.lines, *(row.line for row in table.dropped)], default=0)
    order = _interleave([len(table) for table in tables])
    return Table(
        [tables[which].rows[index] for which, index in order],
        [lines[which][index] for which, index in order],
        " + ".join(table.source for table in tables),
        first.unit,
        tuple(dropped),
        first.label_names,
        tuple(parts),
        tuple(note for table in tables for note in table.notes),
        text_cells=all(table.text_cells for table in tables),
        ignored=tuple(dict.fromkeys(name for table in tables for name in table.ignored)),
    )


def mix_tables(
    tables: Sequence[Table], shares: Sequence[float], seed: int
) -> tuple[list[Table], list[str]]:
    """Return a sample of each table, sized in proportion to `shares`, and a note with the counts.

    No row is repeated: the table that is shortest for its share is used completely. Raises
    `InputError` if a table would contribute no row.
    """
    total = sum(shares)
    whole = min(len(table) * total / share for table, share in zip(tables, shares, strict=True))
    counts = [int(whole * share / total + 1e-9) for share in shares]
    taken = []
    for table, count, share in zip(tables, counts, shares, strict=True):
        if count < 1:
            raise InputError(
                f"--mix {','.join(f'{s:g}' for s in shares)}: a share of {share:g} leaves no row "
                f"of {table.source} beside {min(map(len, tables)):,} rows. Give it more."
            )
        chosen = sorted(random.Random(seed).sample(range(len(table)), count))
        taken.append(replace(table.take(chosen), dropped=table.dropped))
    kept = join_names(
        f"{count:,} of {len(table):,} rows of {table.source}"
        for count, table in zip(counts, tables, strict=True)
    )
    return taken, [f"mixed {' : '.join(f'{share:g}' for share in shares)}: {kept}"]


def _quoted(table: Table) -> str:
    return join_names(map(quote, table.columns))


def _interleave(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (table, row) indices that spread the rows of each table evenly."""
    places = (
        ((index + 0.5) / length, which, index)
        for which, length in enumerate(lengths)
        for index in range(length)
    )
    return [(which, index) for _, which, index in sorted(places)]


BUILTIN = ("docstrings",)
_BUILTIN_SPLITS: tuple[Literal["train", "validation", "test"], ...] = (
    "train",
    "validation",
    "test",
)

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_SPLIT_NAMES = {"train": ("train",), "validation": VALIDATION_NAMES, "test": ("test",)}

_GIVEN = "the data set in memory"

HUB_PREFIX = "hf://datasets/"

# A Hub id: NAME or ORGANIZATION/NAME.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class DatasetSplits:
    """The tables of a dataset; no run reads `test`, and `notes` are sentences to print."""

    train: Table
    validation: Table | None
    test: Table | None
    name: str
    notes: list[str] = field(default_factory=list)


def load_splits(
    dataset: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    on_bad_row: OnBadRow = "error",
    max_samples: int | None = None,
    input_format: str | None = None,
    ignored: Sequence[str] = (),
) -> DatasetSplits:
    """Load the splits of a dataset.

    Args:
        dataset: "builtin:NAME", a file, directory or glob pattern, a Hub id, "-" for stdin, or rows
            in memory. An existing path takes precedence; "hf://datasets/ID" is always a Hub id.
        split: training split; default "train".
        subset: configuration of a Hub dataset, sheet of a workbook, or kind of built-in rows.
        on_bad_row: whether bad rows raise or are dropped, see `readers.files.read_table`.
        max_samples: number of rows to keep per split. Text files are still validated completely.
        input_format: format of local files, as a suffix without the dot; None uses their names.
        ignored: columns to drop where present.

    Raises:
        InputError: the dataset cannot be loaded; the message has `path:line` where possible.
    """
    how = ReadOptions(input_format, subset, ignored=ignored)
    if dataset == IN_MEMORY:
        tables = load_memory_tables(_check_given(dataset), on_bad_row, max_samples, ignored)
        splits = _assemble(tables, pick_split(tables, split, _GIVEN), IN_MEMORY, [])
    elif dataset.startswith("builtin:"):
        splits = _load_builtin(dataset, split, subset, max_samples)
    elif dataset.startswith(HUB_PREFIX):
        splits = _load_hub(dataset.removeprefix(HUB_PREFIX), split, (subset, max_samples, ignored))
    else:
        path = Path(dataset).expanduser()
        if path.is_dir():
            splits = _load_directory(path, dataset, split, (on_bad_row, max_samples, how))
        elif is_pattern(dataset):
            splits = _load_pattern(dataset, split, on_bad_row, how)
        elif dataset == STDIN or path.exists() or path.is_symlink():
            check_one_file(dataset, split)
            splits = DatasetSplits(read_table(dataset, on_bad_row, how), None, None, dataset)
        else:
            check_hub_id(dataset, path)
            splits = _load_hub(dataset, split, (subset, max_samples, ignored))
    notes = [
        note
        for table in (splits.train, splits.validation, splits.test)
        if table is not None
        for note in (*table.notes, *describe_dropped(table))
    ]
    return limit_rows(replace(splits, notes=[*splits.notes, *notes]), max_samples)


def join_splits(
    parts: Sequence[DatasetSplits], shares: Sequence[float] | None, seed: int
) -> DatasetSplits:
    """Return several datasets as one, with training tables mixed in proportion to `shares`.

    If `shares` is None, all rows are kept. Raises `InputError` if the columns differ, or a dataset
    would contribute no row.
    """
    train, notes = [part.train for part in parts], [note for part in parts for note in part.notes]
    if shares is not None:
        train, mixed = mix_tables(train, shares, seed)
        notes += mixed
    validation = [part.validation for part in parts if part.validation is not None]
    test = [part.test for part in parts if part.test is not None]
    return DatasetSplits(
        join_tables(train),
        join_tables(validation) if validation else None,
        join_tables(test) if test else None,
        " + ".join(part.name for part in parts),
        notes,
    )


def limit_rows(splits: DatasetSplits, max_samples: int | None) -> DatasetSplits:
    """Return the first `max_samples` rows of each split; None keeps all."""
    if max_samples is None:
        return splits

    def cut(table: Table) -> Table:
        if len(table) <= max_samples:
            return table
        return replace(table.take(range(max_samples)), dropped=table.dropped)

    return replace(
        splits,
        train=cut(splits.train),
        validation=None if splits.validation is None else cut(splits.validation),
        test=None if splits.test is None else cut(splits.test),
    )


def hold_out(splits: DatasetSplits, validation_split: float, seed: int) -> DatasetSplits:
    """Move a random share of the training rows to validation, unless a validation split exists.

    The selection depends only on `seed` and the number of rows. Both parts keep their order. Raises
    `InputError` if one of them would be empty.
    """
    if validation_split <= 0:
        return splits
    if splits.validation is not None:
        note = f"{splits.name}: has its own validation split; --validation-split is not used"
        return replace(splits, notes=[*splits.notes, note])
    total = len(splits.train)
    count = round(total * validation_split)
    if not 0 < count < total:
        least = math.ceil(1_000_000 / total) / 1_000_000  # selects one row of most totals
        way = f"a share between {least:g} and {1 - least:g}, or " if total > 1 else ""
        raise InputError(
            f"--validation-split {validation_split:g}: holds {count:,} of {total:,} rows out of "
            f"{splits.train.source}; both parts need a row. Give {way}a validation file."
        )
    order = array("q", range(total))
    random.Random(seed).shuffle(order)
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    note = f"validation: {count:,} of {total:,} rows held out of train (seed {seed})"
    return replace(
        splits,
        train=replace(splits.train.take(kept), dropped=splits.train.dropped),
        validation=splits.train.take(held),
        notes=[*splits.notes, note],
    )


def _assemble(
    tables: Mapping[str, Table], train: str, name: str, notes: list[str]
) -> DatasetSplits:
    """Assign tables to train, validation and test; add a note if `train` is not "train"."""
    if train != "train":
        notes = [*notes, f"{name}: trains on split {train!r} of {join_names(tables)}"]
    validation = next((key for key in VALIDATION_NAMES if key in tables and key != train), None)
    return DatasetSplits(
        train=tables[train],
        validation=tables[validation] if validation else None,
        test=tables["test"] if "test" in tables and train != "test" else None,
        name=name,
        notes=notes,
    )


def _load_builtin(
    dataset: str, split: str | None, subset: str | None, max_samples: int | None
) -> DatasetSplits:
    """Load a built-in dataset; `subset` is the kind of rows."""
    name = dataset.removeprefix("builtin:")
    if name not in BUILTIN:
        raise InputError(
            f"--dataset {dataset}: no such built-in set.{did_you_mean(name, BUILTIN)} "
            f"There is: {join_names(f'builtin:{each}' for each in BUILTIN)}."
        )
    if split is not None and split not in _BUILTIN_SPLITS:
        raise InputError(
            f"--split {split}: no such split of {dataset}."
            f"{did_you_mean(split, _BUILTIN_SPLITS)} Splits: {join_names(_BUILTIN_SPLITS)}."
        )
    from ftlevel.data.sources.docstrings import read_docstrings

    kind: Any = subset or "generation"  # checked there
    tables: dict[str, Table] = {}
    for part in _BUILTIN_SPLITS:
        rows = read_docstrings(kind, part, limit=max_samples)
        numbers = list(range(1, len(rows) + 1))
        tables[part] = Table(list(rows), numbers, f"{dataset} ({part})", unit="row")
    return _assemble(tables, split or "train", dataset, [])


def _check_given(dataset: str) -> InMemoryDataset:
    """Return the rows in memory; raise `InputError` if only their name is left."""
    if isinstance(dataset, InMemoryDataset):
        return dataset
    raise InputError(
        f"the data set is called {IN_MEMORY!r}: its rows were handed over in Python, and are not "
        "kept. Give them again there, or rows with --dataset FILE (a file of this name: "
        f"'./{IN_MEMORY}')."
    )


def check_one_file(dataset: str, split: str | None) -> None:
    """Raise `InputError` if a split other than "train" is requested of a file or pattern."""
    if split not in (None, "train"):
        what = "a pattern of files" if is_pattern(dataset) else "one file"
        raise InputError(
            f"--split {split}: {dataset} is {what}, without splits. Drop --split, or name a "
            "directory that holds train and validation files."
        )


def match_training_files(pattern: str, split: str | None, format_: str | None) -> list[Path]:
    """Return the files that match a pattern, all of them training files.

    Raises `InputError` if no file matches, or some but not all are named like validation or test
    data.
    """
    check_one_file(pattern, split)
    files = match_files(pattern, format_)
    held = {name for names in (VALIDATION_NAMES, ("test",)) for name in names}
    others = [str(file) for file in files if stem_of(file.name).lower() in held]
    if others and len(others) < len(files):
        raise InputError(
            f"{pattern}: matches {join_names(others, 4)}, named like rows that are not for "
            "training, "
            f"beside {len(files) - len(others):,} other files. Name the directory, whose files are "
            "used by their names, or a pattern that leaves them out."
        )
    return files


def _load_pattern(
    dataset: str, split: str | None, on_bad_row: OnBadRow, how: ReadOptions
) -> DatasetSplits:
    """Load all files that match a pattern as training rows."""
    files = match_training_files(dataset, split, how.format)
    tables, problems = [], []
    for file in files:
        try:
            tables.append(read_table(file, on_bad_row, how))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    note = f"{dataset}: reads {len(files):,} files: {join_names(map(str, files), 4)}"
    return DatasetSplits(join_tables(tables), None, None, dataset, [note])


def _load_directory(
    path: Path, dataset: str, split: str | None, rest: tuple[OnBadRow, int | None, ReadOptions]
) -> DatasetSplits:
    """Load a directory: one file per split, shards of "train", or `save_to_disk` output."""
    on_bad_row, max_samples, how = rest
    if is_saved_directory(path):
        tables = load_saved_tables(path, max_samples, how.ignored)
        return _assemble(tables, pick_split(tables, split, dataset), dataset, [])
    files, train, notes = choose_files(path, dataset, split)
    if len(files[train]) > 1:
        shards = join_tables([read_table(file, on_bad_row, how) for file in files[train]])
        return DatasetSplits(shards, None, None, dataset, notes)
    tables, problems = {}, []
    for use, [file] in files.items():
        try:
            tables[use] = read_table(file, on_bad_row, how)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return _assemble(tables, train, dataset, [])


def choose_files(
    path: Path, dataset: str, split: str | None
) -> tuple[dict[str, list[Path]], str, list[str]]:
    """Return the files of a directory by split, the name of the training split, and notes.

    Raises `InputError` if there is no training file, or two files belong to the same split.
    """
    names = data_files(path)
    if split is None and _are_shards(names):
        note = f"{dataset}: reads all of {join_names(names)} as training rows"
        return {"train": [path / name for name in names]}, "train", [note]
    stems: dict[str, str] = {}
    for name in names:
        stem = stem_of(name).lower()
        use = next((use for use, stems_ in _SPLIT_NAMES.items() if stem in stems_), stem)
        if use in stems and (use in _SPLIT_NAMES or use == split):
            raise InputError(
                f"{path}: {stems[use]!r} and {name!r} are both its {use} split. Remove one."
            )
        stems[use] = name
    train = (split or "train").lower()
    train = next((use for use, stems_ in _SPLIT_NAMES.items() if train in stems_), train)
    if train not in stems:
        there = f"Files in it: {join_names(names)}." if names else "It holds no data file."
        raise InputError(
            f"{path}: has no {train} file.{did_you_mean(train, stems)} {there} "
            f"Add {train}.jsonl, or name one file: --dataset {path / (names or ['FILE'])[0]}"
        )
    uses = dict.fromkeys([train, *(use for use in _SPLIT_NAMES if use in stems)])
    return {use: [path / stems[use]] for use in uses}, train, []


def _are_shards(names: list[str]) -> bool:
    """Return whether there are several files and none is named like a split."""
    stems = [stem_of(name).lower() for name in names]
    known = {stem for stems_ in _SPLIT_NAMES.values() for stem in stems_}
    return len(names) > 1 and known.isdisjoint(stems) and not closest_matches("train", stems)


def check_hub_id(dataset: str, path: Path) -> None:
    """Raise `InputError` if `dataset` looks like a missing local path rather than a Hub id."""
    looks_local = (
        dataset.startswith((".", "/", "~"))
        or "\\" in dataset
        or dataset.count("/") > 1
        or is_data_file_name(dataset)
    )
    if looks_local or not _HUB_ID.fullmatch(dataset):
        raise InputError(describe_missing(path))
    if "/" in dataset and path.parent.is_dir():
        raise InputError(
            f"{describe_missing(path)} If you mean the data set of the Hub: "
            f"--dataset {HUB_PREFIX}{dataset}"
        )


def _load_hub(
    dataset: str, split: str | None, rest: tuple[str | None, int | None, Sequence[str]]
) -> DatasetSplits:
    """Load a Hub dataset; a sliced `split` is loaded alone."""
    subset, max_samples, ignored = rest
    sliced = split is not None and not split.isidentifier()
    try:
        tables, notes = load_hub_tables(
            dataset, subset, split if sliced else None, max_samples, ignored
        )
    except InputError as error:
        here = did_you_mean(dataset, (entry.name for entry in Path().iterdir()))
        raise InputError(f"{error}{here}") from error
    train = split if sliced and split else pick_split(tables, split, dataset)
    return _assemble(tables, train, dataset, notes)
