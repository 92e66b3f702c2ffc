"""Built-in dataset `builtin:docstrings`: documented code of Python's standard library.

`scripts/build_data.py builtin` writes the file. No module and no docstring is in two splits. This
module must not import torch or datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from ftlevel.errors import InputError, join_names

Kind = Literal["signatures", "generation", "summarization"]
Split = Literal["train", "validation", "test"]
Row = dict[str, str]
_FILE = Path(__file__).parents[1] / "builtin" / "docstrings.jsonl"


def load_docstrings(kind: Kind, split: Split, limit: int | None = None) -> list[Row]:
    """Returns up to `limit` rows of one split, in a fixed pseudo-random order.

    Columns by `kind`: `signatures` has `prompt` (header and summary line) and `completion` (name
    and parameters as JSON); `generation` has `prompt` (source) and `completion` (docstring);
    `summarization` has `document` (docstring without its summary line) and `summary`. Raises
    `InputError` for an unknown `kind` or `split`.
    """
    for name, value, choices in (("kind", kind, get_args(Kind)), ("split", split, get_args(Split))):
        if value not in choices:
            raise InputError(
                f"builtin:docstrings: unknown {name} {value!r}. Available: {join_names(choices)}."
            )
    return list(islice(_read(kind, split), limit))


def load_documentation() -> list[str]:
    """Returns all docstrings of the modules of the test split."""
    return [row["text"] for row in _read("documentation", "test")]


def _read(kind: str, split: str) -> Iterator[Row]:
    prefix = f'{{"kind": "{kind}", "split": "{split}", '
    with _FILE.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith(prefix):
                yield json.loads("{" + line.removeprefix(prefix))
