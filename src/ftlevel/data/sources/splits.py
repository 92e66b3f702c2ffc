"""Find a dataset (built-in, local, in memory or on the Hub) and load it as tables.

`formats` interprets the columns.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ftlevel.artifacts.files import rows_fingerprint
from ftlevel.config import IN_MEMORY, InMemoryDataset
from ftlevel.data.sources.docstrings import Split, load_docstrings
from ftlevel.data.sources.hub import (
    is_saved_directory,
    load_hub_tables,
    load_memory_tables,
    load_saved_tables,
    pick_split,
)
from ftlevel.data.sources.lines import STDIN
from ftlevel.data.sources.readers import (
    ReadOptions,
    data_files,
    is_data_file_name,
    is_pattern,
    load_table,
    match_files,
    stem_of,
)
from ftlevel.data.sources.streams import describe_missing
from ftlevel.data.sources.table import OnBadRow, Table, describe_dropped, join_tables, mix_tables
from ftlevel.errors import InputError, closest_matches, did_you_mean, join_names

BUILTIN = ("docstrings",)

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_SPLIT_OF = {"train": "train", **dict.fromkeys(VALIDATION_NAMES, "validation"), "test": "test"}
"""Name of a file or split in lower case → split."""

HUB_PREFIX = "hf://datasets/"

# A Hub id: NAME or ORGANIZATION/NAME.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class DatasetSplits:
    """The tables of a dataset; `test` is not used in training, and `notes` are printed.

    `corpus` has the documents that validation queries search; None: those of the validation rows.
    """

    train: Table
    validation: Table | None
    test: Table | None
    name: str
    notes: list[str]
    corpus: Sequence[str] | None = None

    @property
    def tables(self) -> dict[str, Table]:
        """The existing tables by split."""
        tables = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: table for name, table in tables.items() if table is not None}

    @property
    def validation_fingerprint(self) -> str | None:
        """Fingerprint of the validation rows and the corpus; None without validation rows."""
        if self.validation is None:
            return None
        corpus = ({"text": text} for text in self.corpus or ())
        return rows_fingerprint([*self.validation.rows, *corpus])


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
        subset: configuration of a Hub dataset, sheet of a workbook, or type of built-in rows.
        on_bad_row: whether invalid rows raise or are dropped, see `readers.load_table`.
        max_samples: number of rows to keep per split. Text files are still validated completely.
        input_format: format of local files, as a suffix without the dot; None uses their names.
        ignored: columns to drop where present.

    Raises:
        InputError: the dataset cannot be loaded; the message has `path:line` where possible.
    """
    options = ReadOptions(input_format, subset, ignored=ignored, limit=max_samples)
    name, path = dataset, Path(dataset).expanduser()
    notes: list[str] = []
    if dataset == IN_MEMORY:
        name = IN_MEMORY
        tables = load_memory_tables(_check_in_memory(dataset), on_bad_row, options)
        train = pick_split(tables, split, "the data set in memory")
    elif dataset.startswith("builtin:"):
        tables = _load_builtin(dataset, options)
        train = pick_split(tables, split, dataset)
    elif (source := _source_type(dataset, path)) == "hub":
        name = dataset.removeprefix(HUB_PREFIX)
        tables, train, notes = _load_hub(name, split, options)
    elif source == "saved":
        tables = load_saved_tables(path, options)
        train = pick_split(tables, split, dataset)
    elif source == "directory":
        groups, train, notes = _choose_files(path, dataset, split)
        read = _read_files(
            [file for files in groups.values() for file in files], on_bad_row, options
        )
        shards = len(groups[train]) > 1
        tables = {train: join_tables(read)} if shards else dict(zip(groups, read, strict=True))
    else:
        files = _match_training_files(dataset, source, split, options)
        tables, train = {"train": join_tables(_read_files(files, on_bad_row, options))}, "train"
        if source == "pattern":
            notes = [f"{dataset}: reads {len(files):,} files: {join_names(map(str, files), 4)}"]
    if train != "train":
        notes = [*notes, f"{name}: trains on split {train!r} of {join_names(tables)}"]
    eval_split = next((key for key in VALIDATION_NAMES if key in tables and key != train), "")
    test = None if train == "test" else tables.get("test")
    splits = DatasetSplits(tables[train], tables.get(eval_split), test, name, [*notes])
    for table in splits.tables.values():
        splits.notes.extend((*table.notes, *describe_dropped(table)))
    return limit_rows(splits, max_samples)


def join_splits(
    parts: Sequence[DatasetSplits], shares: Sequence[float] | None, seed: int
) -> DatasetSplits:
    """Returns several datasets as one, with training tables mixed in proportion to `shares`.

    Without `shares`, all rows are kept. Raises `InputError` for different columns or a dataset
    without rows.
    """
    train, notes = [part.train for part in parts], [note for part in parts for note in part.notes]
    if shares is not None:
        train, mixed = mix_tables(train, shares, seed)
        notes += mixed
    eval_table = [part.validation for part in parts if part.validation is not None]
    test = [part.test for part in parts if part.test is not None]
    return DatasetSplits(
        join_tables(train),
        join_tables(eval_table) if eval_table else None,
        join_tables(test) if test else None,
        " + ".join(part.name for part in parts),
        notes,
    )


def limit_rows(splits: DatasetSplits, max_samples: int | None) -> DatasetSplits:
    """Returns the first `max_samples` rows of each split; None keeps all."""
    if max_samples is None:
        return splits
    cut: dict[str, Any] = {name: t.head(max_samples) for name, t in splits.tables.items()}
    return replace(splits, **cut)


def hold_out(splits: DatasetSplits, validation_split: float, seed: int) -> DatasetSplits:
    """Hold out the share `validation_split` of training rows, unless there is a validation split.

    The selection depends only on `seed` and row count. Raises `InputError` if a part is empty.
    """
    if validation_split <= 0:
        return splits
    if splits.validation is not None:
        message = f"{splits.name}: has its own validation split; --validation-split is not used"
        return replace(splits, notes=[*splits.notes, message])
    total = len(splits.train)
    count = round(total * validation_split)
    if not 0 < count < total:
        least = math.ceil(1_000_000 / total) / 1_000_000  # selects one row of most totals
        share_hint = f"a share between {least:g} and {1 - least:g}, or " if total > 1 else ""
        raise InputError(
            f"--validation-split {validation_split:g}: holds {count:,} of {total:,} rows out of "
            f"{splits.train.source}; both parts need a row. Use {share_hint}a validation file."
        )
    order = array("q", range(total))
    random.Random(seed).shuffle(order)
    eval_indices, train = np.sort(order[:count]), np.sort(order[count:])
    message = f"validation: {count:,} of {total:,} rows held out of train (seed {seed})"
    return replace(
        splits,
        train=replace(splits.train.take(train), dropped=splits.train.dropped),
        validation=splits.train.take(eval_indices),
        notes=[*splits.notes, message],
    )


def _load_builtin(dataset: str, options: ReadOptions) -> dict[str, Table]:
    name = dataset.removeprefix("builtin:")
    if name not in BUILTIN:
        raise InputError(
            f"--dataset {dataset}: no such built-in dataset.{did_you_mean(name, BUILTIN)} "
            f"There is: {join_names(f'builtin:{each}' for each in BUILTIN)}."
        )
    kind: Any = options.subset or "generation"  # checked by `load_docstrings`
    tables = {}
    for part in get_args(Split):
        rows = load_docstrings(kind, part, limit=options.limit)
        tables[part] = Table(rows, range(1, len(rows) + 1), f"{dataset} ({part})", unit="row")
    return tables


def _check_in_memory(dataset: str) -> InMemoryDataset:
    if isinstance(dataset, InMemoryDataset):
        return dataset
    raise InputError(
        f"the data set is called {IN_MEMORY!r}: its rows were passed in Python and are not saved. "
        "Pass them again there, or rows with --dataset FILE (a file of this name: "
        f"'./{IN_MEMORY}')."
    )


def _source_type(dataset: str, path: Path) -> str:
    if dataset.startswith(HUB_PREFIX):
        return "hub"
    if path.is_dir():
        return "saved" if is_saved_directory(path) else "directory"
    if is_pattern(dataset):
        return "pattern"
    if dataset == STDIN or path.exists() or path.is_symlink():
        return "file"
    _check_hub_id(dataset, path)
    return "hub"


def _match_training_files(
    dataset: str, source: str, split: str | None, options: ReadOptions
) -> Sequence[str | Path]:
    """Returns the training files; `InputError` if only some are named like evaluation data."""
    if split not in (None, "train"):
        description = "a pattern of files" if source == "pattern" else "one file"
        raise InputError(
            f"--split {split}: {dataset} is {description}, without splits. Drop --split, or "
            f"choose a directory with train and validation files."
        )
    if source == "file":
        return [dataset]
    files = match_files(dataset, options.format)
    others = [
        str(file) for file in files if _SPLIT_OF.get(stem_of(file.name).lower(), "train") != "train"
    ]
    if others and len(others) < len(files):
        raise InputError(
            f"{dataset}: matches {join_names(others, 4)}, named like evaluation data, and "
            f"{len(files) - len(others):,} other files. Use the directory, whose files are "
            f"assigned to splits by name, or a pattern that excludes them."
        )
    return files


def _read_files(
    files: Sequence[str | Path], on_bad_row: OnBadRow, options: ReadOptions
) -> list[Table]:
    tables, problems = [], []
    for file in files:
        try:
            tables.append(load_table(file, on_bad_row, options))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return tables


def _choose_files(
    path: Path, dataset: str, split: str | None
) -> tuple[dict[str, list[Path]], str, list[str]]:
    """Returns the files of a directory by split, the name of the training split, and notes."""
    names = data_files(path)
    if split is None and _are_shards(names):
        message = f"{dataset}: reads all of {join_names(names)} as training rows"
        return {"train": [path / name for name in names]}, "train", [message]
    files: dict[str, str] = {}
    for name in names:
        stem = stem_of(name).lower()
        use = _SPLIT_OF.get(stem, stem)
        if use in files and (use in _SPLIT_OF or use == split):
            raise InputError(
                f"{path}: {files[use]!r} and {name!r} are both its {use} split. Remove one."
            )
        files[use] = name
    train = (split or "train").lower()
    train = _SPLIT_OF.get(train, train)
    if train not in files:
        listing = f"Files in it: {join_names(names)}." if names else "It holds no data file."
        raise InputError(
            f"{path}: has no {train} file.{did_you_mean(train, files)} {listing} "
            f"Add {train}.jsonl, or name one file: --dataset {path / (names or ['FILE'])[0]}"
        )
    uses = dict.fromkeys([train, *(use for use in get_args(Split) if use in files)])
    return {use: [path / files[use]] for use in uses}, train, []


def _are_shards(names: list[str]) -> bool:
    """Returns whether `names` are several files, none of them named like a split."""
    stems = [stem_of(name).lower() for name in names]
    is_named = not _SPLIT_OF.keys().isdisjoint(stems) or closest_matches("train", stems)
    return len(names) > 1 and not is_named


def _check_hub_id(dataset: str, path: Path) -> None:
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
    dataset: str, split: str | None, options: ReadOptions
) -> tuple[dict[str, Table], str, list[str]]:
    """Returns tables, training split and notes; a sliced `split` is loaded alone."""
    sliced = split if split is not None and not split.isidentifier() else None
    try:
        tables, notes = load_hub_tables(dataset, sliced, options)
    except InputError as error:
        hint = did_you_mean(dataset, (entry.name for entry in Path().iterdir()))
        raise InputError(f"{error}{hint}") from error
    return tables, sliced or pick_split(tables, split, dataset), notes
