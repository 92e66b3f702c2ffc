"""Order rows and divide them into train, validation and test by the SHA-1 of their key."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAMES = ("train", "validation", "test")


def digest(*parts: object) -> str:
    """Return the SHA-1 of `parts`, joined by a separator character."""
    return hashlib.sha1("\x1f".join(map(str, parts)).encode()).hexdigest()


def squeeze(text: str) -> str:
    """Return `text` with white space collapsed to single spaces, and stripped."""
    return re.sub(r"\s+", " ", text).strip()


def whole_row(row: Row) -> str:
    """Return a key that is unique to the row."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Splits:
    """The finished rows of one data set."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def parts(self) -> tuple[tuple[str, list[Row]], ...]:
        """Return the name and the rows of each split."""
        return tuple(zip(NAMES, (self.train, self.validation, self.test), strict=True))


def split_rows(
    name: str,
    rows: Iterable[Row],
    sizes: tuple[int, int, int],
    key: Callable[[Row], str] = whole_row,
    group: Callable[[Row], str] | None = None,
) -> Splits:
    """Drop repeated rows, sort the rest by digest, and split them.

    Args:
        name: name of the data set, part of every digest, so that sets have different orders.
        rows: rows in any order.
        sizes: maximum number of train, validation and test rows.
        key: key of equal rows.
        group: rows of one group, such as a file or a country, stay in one split.
    """
    ordered = _unique_in_order(name, rows, key)
    if group is not None:
        return _split_groups(name, ordered, sizes, group)
    validation_size, test_size = sizes[1], sizes[2]
    if len(ordered) < sum(sizes):
        validation_size = test_size = len(ordered) // 10
    train_start = validation_size + test_size
    return Splits(
        train=ordered[train_start : train_start + sizes[0]],
        validation=ordered[:validation_size],
        test=ordered[validation_size:train_start],
    )


def _unique_in_order(name: str, rows: Iterable[Row], key: Callable[[Row], str]) -> list[Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(key(row), row)
    keyed = [(digest(name, text), row) for text, row in first.items()]
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


def _split_groups(
    name: str, ordered: list[Row], sizes: tuple[int, int, int], group: Callable[[Row], str]
) -> Splits:
    """Assign whole groups to validation, then test, up to their share; the rest to train."""
    members = Counter(map(group, ordered))
    share = [len(ordered) * size / sum(sizes) for size in sizes]
    split_of_group: dict[str, int] = {}
    count = 0
    for label in sorted(members, key=lambda item: digest(name, "g", item)):
        in_validation, in_test = count < share[1], count < share[1] + share[2]
        split_of_group[label] = 1 if in_validation else 2 if in_test else 0
        count += members[label]
    rows_by_split = [
        [row for row in ordered if split_of_group[group(row)] == index][:size]
        for index, size in enumerate(sizes)
    ]
    return Splits(*rows_by_split)


def balance(rows: Iterable[Row], label: str, limit: int) -> list[Row]:
    """Return equally many rows per label, at most `limit`, selected by the digest of `text`."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row[label]].append(row)
    count = min(limit, *(len(label_rows) for label_rows in by_label.values()))
    return [
        row
        for name in sorted(by_label)
        for row in sorted(by_label[name], key=lambda row: digest("bal", row["text"]))[:count]
    ]


def write_splits(splits: Splits, folder: Path) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder`."""
    for name, rows in splits.parts():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
