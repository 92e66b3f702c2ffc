"""Check that all rows of a file have the same keys and one type per column.

The keys and types of most rows are the reference. Rows that differ are reported instead of being
filled with nulls or converted to strings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import did_you_mean, join_names, quote

# int and float are the same kind. null has no kind and is allowed in any column.
_KINDS: dict[type, str] = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

_Shape = tuple[tuple[str, ...], tuple[type, ...]]


def json_type_name(value: object) -> str:
    """Return the name of a JSON type for messages, such as "a string" or "a number"."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


class RowShapeCounter:
    """Counter of the combinations of keys and types in rows; each row costs one dict lookup."""

    def __init__(self) -> None:
        self._groups: dict[_Shape, list[int]] = {}  # number of rows, index of the first
        self._count = 0

    def add(self, row: Row) -> None:
        """Count a row."""
        shape = _shape_of(row)
        group = self._groups.get(shape)
        if group is None:
            self._groups[shape] = [1, self._count]
        else:
            group[0] += 1
        self._count += 1

    def find_odd(self, rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
        """Return the counted rows whose keys or types differ from most, in order of line."""
        if len(self._groups) <= 1:
            return []
        sizes: Counter[frozenset[str]] = Counter()
        for shape, (size, _) in self._groups.items():
            sizes[frozenset(shape[0])] += size
        usual = sizes.most_common(1)[0][0]  # ties: the first one counted
        regular = {s: g for s, g in self._groups.items() if usual == frozenset(s[0])}
        columns = next(iter(regular))[0]
        kinds, since = _usual_kinds(regular)
        odd = {
            shape
            for shape in self._groups
            if shape not in regular or any(True for _ in _odd_columns(shape, kinds))
        }
        found: list[BadRow] = []
        for index, row in enumerate(rows if odd else ()):
            shape = _shape_of(row)
            if shape not in odd:
                continue
            line = lines[index]
            if shape not in regular:
                found.append(BadRow(line, _describe_keys(shape[0], columns, sizes[usual])))
                continue
            for key in _odd_columns(shape, kinds):
                reason = _describe_kind(key, row[key], kinds[key], lines[since[key]])
                found.append(BadRow(line, reason))
        return sorted(found, key=lambda row: row.line)


def find_inconsistent_rows(rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
    """Return the rows whose keys or types differ from those of most rows, in order of line."""
    shapes = RowShapeCounter()
    for row in rows:
        shapes.add(row)
    return shapes.find_odd(rows, lines)


def _shape_of(row: Row) -> _Shape:
    return tuple(row), tuple(map(type, row.values()))


def _usual_kinds(shapes: Mapping[_Shape, Sequence[int]]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the most frequent type of each column, and the first row that has it."""
    counts: dict[str, Counter[str]] = {}
    first: dict[tuple[str, str], int] = {}
    for (keys, types), (size, begin) in shapes.items():
        for key, type_ in zip(keys, types, strict=True):
            if kind := _KINDS.get(type_):
                counts.setdefault(key, Counter())[kind] += size
                first[key, kind] = min(first.get((key, kind), begin), begin)
    usual = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    return usual, {key: first[key, kind] for key, kind in usual.items()}


def _odd_columns(shape: _Shape, usual: Mapping[str, str]) -> Iterator[str]:
    """Yield the columns whose type differs from `usual`."""
    for key, type_ in zip(*shape, strict=True):
        kind = _KINDS.get(type_)
        if kind is not None and kind != usual[key]:
            yield key


@dataclass(frozen=True)
class RowSchema:
    """The usual keys and types of the first `count` rows of a stream.

    `kinds` maps each column with a value to its type and the line of an example.
    """

    columns: tuple[str, ...]
    kinds: dict[str, tuple[str, int]]
    count: int

    @classmethod
    def of(cls, rows: Sequence[Row], lines: Sequence[int]) -> RowSchema:
        """Return the form of most of `rows`."""
        odd = {row.line for row in find_inconsistent_rows(rows, lines)}
        kinds: dict[str, tuple[str, int]] = {}
        columns: tuple[str, ...] = ()
        for row, line in zip(rows, lines, strict=True):
            if line in odd:
                continue
            columns = columns or tuple(row)
            for key, value in row.items():
                if value is not None:
                    kinds.setdefault(key, (json_type_name(value), line))
        return cls(columns, kinds, len(rows) - len(odd))

    def find_odd(self, rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
        """Return the rows whose keys or types differ from the form."""
        odd = []
        for row, line in zip(rows, lines, strict=True):
            if row.keys() != set(self.columns):
                odd.append(BadRow(line, _describe_keys(tuple(row), self.columns, self.count)))
                continue
            for key, value in row.items():
                usual, since = self.kinds.get(key, (json_type_name(value), line))
                if value is not None and json_type_name(value) != usual:
                    odd.append(BadRow(line, _describe_kind(key, value, usual, since)))
                    break
        return odd


def _describe_keys(keys: tuple[str, ...], columns: tuple[str, ...], count: int) -> str:
    """Return how `keys` differ from the `columns` that `count` other rows have."""
    missing = [key for key in columns if key not in keys]
    extra = [key for key in keys if key not in columns]
    others = f"the {count:,} other rows" if count > 1 else "the other row"
    lacks, has = join_names(map(quote, missing)), join_names(map(quote, extra))
    if missing and extra:
        hint = did_you_mean(extra[0], missing).strip()
        aside = f" ({hint[0].lower()}{hint[1:]})" if hint else ""
        return f"lacks {lacks} and has {has}, unlike {others}{aside}"
    if missing:
        verb = "have" if count > 1 else "has"
        return f"lacks {lacks}, which {others} {verb} (a value may be null, the key must be there)"
    return f"has {has}, which {others} {'lack' if count > 1 else 'lacks'}"


def _describe_kind(key: str, value: object, usual: str, since: int) -> str:
    return (
        f"{key!r} is {json_type_name(value)} ({quote(value)}), but {usual} in most rows "
        f"(line {since} for one)"
    )
