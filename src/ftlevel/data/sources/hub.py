"""Data sets of the Hugging Face Hub, and directories that `datasets` saved: tables and streams.

A Hub that can't be reached is an ordinary state: one short request finds it out, before the library
begins its retries. `datasets` is imported by the functions that need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.parquet import build_arrow_table, clean_rows
from ftlevel.data.sources.streams import Chunk, Cursor, describe_null_keys
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, did_you_mean, listing
from ftlevel.models.upstream.data import datasets_offline

PROBE_SECONDS = 5.0


def load_hub_tables(
    name: str, subset: str | None, only: str | None, most: int | None, ignored: Sequence[str] = ()
) -> tuple[dict[str, Table], list[str]]:
    """Load the splits of a Hub data set, from the cache where the Hub can't be reached.

    Args:
        name: the id, such as "imdb" or "org/name".
        subset: its configuration, where it has several.
        only: one split, in the grammar of `datasets` ("train[:10%]"); None loads all.
        most: the number of rows to keep of each split; None keeps all.
        ignored: columns that are left out.

    Returns:
        The tables by split, and notes for the user.

    Raises:
        InputError: no such data set, subset or split; not permitted; or offline without a copy.
    """
    import datasets

    reason = _probe(name)
    notes = []
    try:
        with datasets_offline(bool(reason)):
            found = datasets.load_dataset(name, subset, split=only)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        if reason:
            raise InputError(_describe_offline(name, reason)) from None
        # RuntimeError is how `datasets` says that it no longer runs loading scripts.
        raise InputError(f"--dataset {name}: {_first_line(error)}") from error
    if reason:
        notes.append(f"{name}: the Hub was not reached ({reason}); used the copy in the cache")
    splits = found if isinstance(found, Mapping) else {only or "train": found}
    return {
        key: dataset_table(data, f"{name} ({key})", most, ignored) for key, data in splits.items()
    }, notes


def open_hub_streams(name: str, subset: str | None) -> dict[str, Any]:
    """Return the splits of a Hub data set as `datasets.IterableDataset`, of which nothing is read.

    Raises:
        InputError: no such data set or subset; not permitted; or offline.
    """
    import datasets

    if reason := _probe(name):
        raise InputError(_describe_offline(name, reason))
    try:
        return dict(datasets.load_dataset(name, subset, streaming=True))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--dataset {name}: {_first_line(error)}") from error


def open_saved_streams(directory: Path) -> dict[str, Any]:
    """Return what `save_to_disk` wrote as `datasets.IterableDataset`, by split."""
    return {key: data.to_iterable_dataset() for key, data in _load_saved(directory).items()}


class IterableStream:
    """A `datasets.IterableDataset`: of the Hub, or of a directory that `save_to_disk` wrote.

    Args:
        make: opens it anew, at its beginning.
        source: what messages begin with.
    """

    def __init__(self, make: Callable[[], Any], source: str) -> None:
        self._make, self.source = make, source
        self.null_keys: Counter[str] = Counter()

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        data, number = self._make(), 0
        if cursor is not None:
            data.load_state_dict(cursor["state"])
            number = int(cursor["number"])
        rows: list[Row] = []

        def chunk() -> Chunk:
            numbers = list(range(number - len(rows) + 1, number + 1))
            after = {"state": data.state_dict(), "number": number}
            return Chunk(rows, numbers, [], self.source, "row", after)

        schema = data.features and data.features.arrow_schema
        for row in data:
            rows += clean_rows([row], schema, self.null_keys)
            number += 1
            if len(rows) == PART:
                yield chunk()
                rows = []
        if rows:
            yield chunk()

    def collect(self) -> Table:
        """Return all rows as a table.

        Raises:
            InputError: there are none.
        """
        chunks = list(self.chunks())
        if not chunks:
            raise InputError(f"{self.source}: has 0 rows. Give a set with rows.")
        rows = [row for chunk in chunks for row in chunk.rows]
        notes = tuple(describe_null_keys(self.null_keys, self.source))
        return Table(rows, range(1, len(rows) + 1), self.source, "row", notes=notes)


def load_saved_tables(
    directory: Path, most: int | None, ignored: Sequence[str] = ()
) -> dict[str, Table]:
    """Load what `save_to_disk` wrote; a single data set is its "train" split.

    Raises:
        InputError: the directory is damaged.
    """
    found = _load_saved(directory)
    return {
        key: dataset_table(data, f"{directory} ({key})", most, ignored)
        for key, data in found.items()
    }


def _load_saved(directory: Path) -> dict[str, Any]:
    import datasets

    try:
        found = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory}: not a readable save_to_disk directory ({_first_line(error)}) "
            "Write it again."
        ) from error
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def is_saved_directory(directory: Path) -> bool:
    """Tell whether `directory` looks like one that `save_to_disk` wrote."""
    names = ("dataset_dict.json", "state.json", "dataset_info.json")
    return any((directory / name).is_file() for name in names)


def pick_split(splits: Mapping[str, Any], wish: str | None, source: str) -> str:
    """Return the name of the split to train on.

    Raises:
        InputError: `wish` is none of them, or there is no "train" and no wish.
    """
    name = wish or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name in splits:
        return name
    there = f"Splits: {listing(splits)}."
    if wish is None:
        raise InputError(f"{source}: has no split 'train'. {there} Pick one with --split.")
    raise InputError(
        f"--split {wish}: no such split of {source}.{did_you_mean(wish, splits)} {there}"
    )


def _probe(name: str) -> str:
    """Return why the Hub can't be reached, or an empty string.

    What the Hub answers (no such id, gated) is left to `load_dataset`, which says it well.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=PROBE_SECONDS)
    except HFValidationError:
        return ""
    except OfflineModeIsEnabled:
        return "offline mode: HF_HUB_OFFLINE is set"
    except HfHubHTTPError:
        return ""
    # The HTTP library below huggingface_hub changed its name between releases; the base of the
    # Hub's own error is that library's base error in each.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        return _first_line(error).rstrip(".")
    return ""


def _describe_offline(name: str, reason: str) -> str:
    return (
        f"--dataset {name}: no file or directory here has this name, and the Hugging Face Hub "
        f"can't be reached ({reason}); no copy is in the cache. Connect once to download it, copy "
        "the cache directory of a machine that has it (HF_HOME), name a local file, "
        "or use --dataset builtin:docstrings."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def dataset_table(data: Any, source: str, most: int | None, ignored: Sequence[str] = ()) -> Table:
    """Turn the first `most` rows of a `datasets.Dataset` into a table with the class names.

    The columns `ignored` are not read.
    """
    data, left_out = remove_columns(data, ignored)
    chosen = data if most is None or most >= len(data) else data.select(range(most))
    # Formatting as Arrow applies an index mapping (after select, filter, shuffle).
    content = chosen.with_format("arrow")[:]
    table = build_arrow_table(content, source)
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    return replace(table, label_names=names, ignored=left_out)


def remove_columns(data: Any, names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Return `data` of `datasets` without those of the columns `names` that it has, and these."""
    there = tuple(name for name in names if name in (data.column_names or ()))
    return (data.remove_columns(list(there)) if there else data), there
