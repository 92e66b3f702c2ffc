"""Open a dataset for streaming: local files and directories, or a Hub dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.config import IN_MEMORY
from ftlevel.data.sources.hub import (
    IterableStream,
    is_saved_directory,
    open_hub_streams,
    open_saved_streams,
    pick_split,
    remove_columns,
)
from ftlevel.data.sources.lines import STDIN
from ftlevel.data.sources.readers.arrow import refuse_media
from ftlevel.data.sources.readers.files import ReadOptions, is_pattern, open_stream, read_table
from ftlevel.data.sources.splits import (
    HUB_PREFIX,
    VALIDATION_NAMES,
    check_hub_id,
    check_one_file,
    choose_files,
    match_training_files,
)
from ftlevel.data.sources.streams import ChainedStream, Stream
from ftlevel.data.sources.table import OnBadRow, Table
from ftlevel.errors import InputError

REMOTE_ROWS = 1_000
"""Default number of validation rows read from a Hub dataset or `save_to_disk` directory."""


@dataclass(frozen=True)
class StreamSource:
    """A streamed dataset with its validation rows in memory.

    `files` is empty for a Hub dataset. `notes` are sentences to print. `ignored` are the columns
    that are present but not read.
    """

    train: Stream
    validation: Table | None = None
    files: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()


def open_source(
    dataset: str,
    *,
    split: str | None,
    subset: str | None,
    on_bad_row: OnBadRow,
    validation_rows: int | None,
    input_format: str | None = None,
    ignored: Sequence[str] = (),
) -> StreamSource:
    """Open a dataset for streaming; only its validation rows are read, at most `validation_rows`.

    The other arguments are those of `splits.load_splits`; `on_bad_row` applies to validation rows.
    Raises `InputError` if the dataset does not exist or cannot be streamed.
    """
    how = ReadOptions(input_format, subset, ignored=ignored)
    if dataset.startswith("builtin:") or dataset == IN_MEMORY:
        words = dataset if dataset != IN_MEMORY else "the data set"
        raise InputError(f"--streaming: {words} is in memory already. Drop --streaming.")
    path = Path(dataset).expanduser()
    if is_pattern(dataset):
        matched = match_training_files(dataset, split, input_format)
        return _open_files(matched, None, how, [])
    is_local = dataset == STDIN or path.exists() or path.is_symlink()
    if dataset.startswith(HUB_PREFIX) or not is_local:
        name = dataset.removeprefix(HUB_PREFIX)
        if name == dataset:
            check_hub_id(dataset, path)
        return _open_remote(
            lambda: open_hub_streams(name, subset), split, name, (validation_rows, ignored)
        )
    if path.is_dir() and is_saved_directory(path):
        saved = _open_remote(
            lambda: open_saved_streams(path), split, dataset, (validation_rows, ignored)
        )
        return replace(saved, files=tuple(sorted(path.rglob("*.arrow"))))
    if not path.is_dir():
        check_one_file(dataset, split)
        reader = open_stream(dataset, how)
        return StreamSource(
            reader, files=(reader.path,), notes=reader.notes, ignored=reader.ignored
        )
    files, train, notes = choose_files(path, dataset, split)
    held = files.get("validation") if train != "validation" else None
    validation = read_table(held[0], on_bad_row, how) if held else None
    if validation is not None and validation_rows is not None:
        validation = validation.take(range(min(validation_rows, len(validation))))
    return _open_files(files[train], validation, how, notes)


def _open_files(
    files: Sequence[Path], validation: Table | None, how: ReadOptions, notes: Sequence[str]
) -> StreamSource:
    """Return the training rows of `files` as one stream, file after file."""
    streams = [open_stream(file, how) for file in files]
    stream = streams[0] if len(streams) == 1 else ChainedStream(streams)
    said = [*notes, *(note for each in streams for note in each.notes)]
    return StreamSource(stream, validation, tuple(files), said, streams[0].ignored)


def _open_remote(
    make: Callable[[], Mapping[str, Any]],
    split: str | None,
    name: str,
    rest: tuple[int | None, Sequence[str]],
) -> StreamSource:
    """Return the training stream and validation table of the splits that `make` opens."""
    found, (most, ignored) = make(), rest
    train = pick_split(found, split, name)
    rows, left_out = remove_columns(found[train], ignored)
    if rows.features is not None:
        refuse_media(rows.features.arrow_schema, f"{name} ({train})")
    held = next((key for key in VALIDATION_NAMES if key in found and key != train), None)
    validation = None
    if held is not None:
        first = remove_columns(found[held], ignored)[0].take(most or REMOTE_ROWS)
        validation = IterableStream(lambda: first, f"{name} ({held})").collect()
    stream = IterableStream(lambda: remove_columns(make()[train], ignored)[0], f"{name} ({train})")
    return StreamSource(stream, validation, ignored=left_out)
