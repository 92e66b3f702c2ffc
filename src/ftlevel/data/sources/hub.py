"""Load datasets from the Hugging Face Hub, `save_to_disk` directories and Python objects.

A short request checks that the Hub is reachable before `datasets` starts its retries. Functions
import `datasets` lazily. Error messages name rows in memory by number and never print their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftlevel.artifacts.hub import first_line
from ftlevel.config import InMemoryDataset
from ftlevel.data.sources.readers import ReadOptions
from ftlevel.data.sources.readers.arrow import (
    arrow_rows,
    check_columns,
    class_names,
    clean_value,
    create_arrow_table,
    drop_null_keys,
)
from ftlevel.data.sources.streams import describe_null_keys
from ftlevel.data.sources.table import OnBadRow, Row, Table, get_inconsistent_rows, handle_bad_rows
from ftlevel.errors import InputError, did_you_mean, join_names
from ftlevel.models.upstream.libraries import datasets_offline

PROBE_TIMEOUT = 5.0


def load_hub_tables(
    name: str, split: str | None, options: ReadOptions
) -> tuple[dict[str, Table], list[str]]:
    """Returns the splits of a Hub dataset as tables by name, and notes to print.

    If the Hub is unreachable, the cached copy is used. `split` may be sliced ("train[:10%]"); None
    loads all. Raises `InputError` for an unknown dataset, subset or split, if access is denied, and
    offline without a cached copy.
    """
    reason = _probe(name)
    data = _load_dataset(name, reason, options.subset, split=split)
    message = f"{name}: the Hub was not reached ({reason}); used the copy in the cache"
    splits = data if isinstance(data, Mapping) else {split or "train": data}
    return _tables_of(splits, name, options), [message] if reason else []


def _load_dataset(name: str, offline_reason: str, subset: str | None, **options: Any) -> Any:
    import datasets

    try:
        with datasets_offline(bool(offline_reason)):
            return datasets.load_dataset(name, subset, **options)
    # `datasets` raises RuntimeError for loading scripts, which are no longer supported.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        if offline_reason:
            raise InputError(_describe_offline(name, offline_reason)) from None
        raise InputError(f"--dataset {name}: {first_line(error)}") from error


def load_saved_tables(directory: Path, options: ReadOptions) -> dict[str, Table]:
    """Load a `save_to_disk` directory; a single `Dataset` becomes the split "train"."""
    return _tables_of(_load_saved(directory), str(directory), options)


def _load_saved(directory: Path) -> dict[str, Any]:
    import datasets

    try:
        data = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory}: not a readable save_to_disk directory ({first_line(error)}) "
            "Write it again."
        ) from error
    return dict(data) if isinstance(data, Mapping) else {"train": data}


def is_saved_directory(directory: Path) -> bool:
    """Returns whether `directory` was written by `save_to_disk`."""
    names = ("dataset_dict.json", "state.json", "dataset_info.json")
    return any((directory / name).is_file() for name in names)


def pick_split(splits: Mapping[str, Any], requested: str | None, source: str) -> str:
    """Returns the split `requested`, else "train" or the only one; `InputError` if missing."""
    if not splits:
        raise InputError(f"{source}: has no splits. Expected at least one with rows.")
    name = requested or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name in splits:
        return name
    listing = f"Splits: {join_names(splits)}."
    if requested is None:
        raise InputError(f"{source}: has no split 'train'. {listing} Pick one with --split.")
    raise InputError(
        f"--split {name}: no such split of {source}.{did_you_mean(name, splits)} {listing}"
    )


def _probe(name: str) -> str:
    """Returns why the Hub is unreachable; "" if it is reachable, or replies with an HTTP error."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=PROBE_TIMEOUT)
    except OfflineModeIsEnabled:
        return "offline mode: HF_HUB_OFFLINE is set"
    except (HFValidationError, HfHubHTTPError):
        return ""
    # The base class of HfHubHTTPError is the base error of the HTTP library in use, which differs
    # between releases of huggingface_hub.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        return first_line(error).rstrip(".")
    return ""


def _describe_offline(name: str, message: str) -> str:
    return (
        f"--dataset {name}: no file or directory here has this name, and the Hugging Face Hub "
        f"can't be reached ({message}); no copy is in the cache. Connect once to download it, copy "
        "the cache directory of a machine that has it (HF_HOME), name a local file, "
        "or use --dataset builtin:docstrings."
    )


def _tables_of(splits: Mapping[str, Any], name: str, options: ReadOptions) -> dict[str, Table]:
    return {key: _dataset_table(data, f"{name} ({key})", options) for key, data in splits.items()}


def _dataset_table(data: Any, source: str, options: ReadOptions) -> Table:
    data, left_out = remove_columns(data, options.ignored)
    # The Arrow format applies the index mapping of select, filter and shuffle.
    table = create_arrow_table(data.with_format("arrow")[: options.limit], source)
    names = class_names(data.features.arrow_schema.metadata)
    return replace(table, label_names=names, ignored=left_out)


def remove_columns(data: Any, names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Returns `data` without the columns `names`, and the names that were present."""
    existing = tuple(name for name in names if name in (data.column_names or ()))
    return (data.remove_columns(list(existing)) if existing else data), existing


_TYPES = "a DataFrame, a datasets.Dataset or DatasetDict, or a list of dicts"


def load_memory_tables(
    data: InMemoryDataset, on_bad_row: OnBadRow, options: ReadOptions
) -> dict[str, Table]:
    """Returns rows passed from Python as tables by split; rows without splits are "train".

    An iterator in `data.rows` (modified) is replaced by a list of its first `options.limit` rows.
    Raises `InputError` for an unsupported type, and for no rows or invalid rows.
    """
    if isinstance(data.rows, Iterator):
        data.rows = list(islice(data.rows, options.limit))
    rows = data.rows
    if not isinstance(rows, Mapping):
        return {"train": _to_table(rows, data.label, on_bad_row, options)}
    if not all(_is_split(part) for part in rows.values()):
        raise InputError(
            "the rows in memory are a dict of columns. Expected rows: "
            f"{_TYPES}; datasets.Dataset.from_dict(…) makes one of columns."
        )
    return {
        str(name): _to_table(part, f"{data.label} ({name})", on_bad_row, options)
        for name, part in rows.items()
    }


def _is_split(split: Any) -> bool:
    if isinstance(split, list | tuple):
        return bool(split) and isinstance(split[0], Mapping)
    return hasattr(split, "columns") or hasattr(split, "features")


def _to_table(rows: Any, source: str, on_bad_row: OnBadRow, options: ReadOptions) -> Table:
    if hasattr(rows, "features") and hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        table = _dataset_table(rows, source, options)
    else:
        null_keys: Counter[str] = Counter()
        values = list(islice(iterate_rows(rows, source, null_keys), options.limit))
        existing = tuple(name for name in options.ignored if values and name in values[0])
        if existing:
            values = [{k: v for k, v in row.items() if k not in existing} for row in values]
        notes = tuple(describe_null_keys(null_keys, source))
        numbers = range(1, len(values) + 1)
        table = Table(values, numbers, source, unit="row", notes=notes, ignored=existing)
    if not len(table):
        raise InputError(f"{source}: has 0 rows. Pass at least one.")
    return handle_bad_rows(table, get_inconsistent_rows(table.rows, table.lines), on_bad_row)


def iterate_rows(rows: Any, source: str, null_keys: Counter[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a DataFrame, Arrow table, `datasets` object or iterable of mappings.

    Values become JSON values, and missing values of a DataFrame None. `null_keys` (modified) counts
    the dropped keys with value null, by path. Raises `InputError` if `rows` is of a different type.
    """
    null_keys = Counter() if null_keys is None else null_keys
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        yield from _frame_rows(rows, source, null_keys)
    elif hasattr(rows, "to_pylist"):  # pyarrow.Table or RecordBatch
        check_columns(rows.schema.names, source)
        yield from arrow_rows(rows, null_keys)
    else:
        schema = getattr(getattr(rows, "features", None), "arrow_schema", None)
        is_arrow = hasattr(rows, "features")
        for row in _check_rows(rows, source):
            values = {str(key): _to_json(value) for key, value in row.items()}
            yield drop_null_keys([values], schema, null_keys)[0] if is_arrow else values


def _frame_rows(frame: Any, source: str, null_keys: Counter[str]) -> Iterator[Row]:
    names = [str(name) for name in frame.columns]
    check_columns(names, source)
    column_names = []
    for number in range(len(names)):
        column = frame.iloc[:, number]
        if hasattr(column.dtype, "pyarrow_dtype"):  # numpy would turn integers to floats
            import pyarrow as pa  # type: ignore[import-untyped]

            table = pa.table({names[number]: pa.array(column)})
            column_names.append([row[names[number]] for row in arrow_rows(table, null_keys)])
            continue
        cells = zip(column.astype(object), column.isna(), strict=True)
        values = [None if is_null else value for value, is_null in cells]
        converted = list(map(_to_json, values))
        if column.dtype == object and any(map(_has_array, values)):
            converted = [
                clean_value(value, names[number], null_keys) for value in _to_integers(converted)
            ]
        column_names.append(converted)
    for row in zip(*column_names, strict=True):
        yield dict(zip(names, row, strict=True))


def _to_integers(values: list[Any]) -> list[Any]:
    """Returns a column with integers where pandas made them floats because of nulls."""
    nulls: set[str] = set()
    others: set[str] = set()

    def apply(function: Callable[[Any, str], Any], value: Any, path: str = "") -> Any:
        if isinstance(value, dict):
            return {key: apply(function, item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [apply(function, item, path) for item in value]
        return function(value, path)

    def inspect(value: Any, path: str) -> None:
        if value is None or value != value:
            nulls.add(path)
        elif not isinstance(value, float) or not value.is_integer():
            others.add(path)

    def restore(value: Any, path: str) -> Any:
        if isinstance(value, float) and (value != value or path in integers):
            return None if value != value else int(value)
        return value

    apply(inspect, values)
    integers = nulls - others
    restored: list[Any] = apply(restore, values)
    return restored


def _has_array(value: Any) -> bool:
    """Returns whether a cell is or contains a numpy array, as pandas reads lists from Parquet."""
    if isinstance(value, Mapping):
        return any(map(_has_array, value.values()))
    return type(value).__module__ == "numpy" and hasattr(value, "__len__")


def _check_rows(rows: Any, source: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(rows, Mapping):
        raise InputError(
            f"{source}: the rows in memory are a dict of {join_names(map(repr, rows))}. "
            "Expected the rows of one split, such as rows['test']."
        )
    if not isinstance(rows, Iterable):
        raise InputError(
            f"the rows in memory are of type {type(rows).__name__}. Expected {_TYPES}."
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{source} row {number} is of type {type(row).__name__}. Expected a dict from "
                "column to value, such as {'text': …, 'label': …}."
            )
        yield row


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if type(value).__module__ == "numpy":
        python = value.tolist()
        return _to_json(python) if isinstance(python, list) else python
    return value
