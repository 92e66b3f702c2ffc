"""Whether the rows of a file agree: the same keys in each, one type a column.

A loader that guesses fills an odd row with nulls or turns a whole column into strings. Here the
form that most rows have is the form of the file, and the rows that differ are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import did_you_mean, listing, quote

# An integer and a fraction are both numbers. `null` has no kind: any column may have it.
_KINDS: dict[type, str] = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

_Shape = tuple[tuple[str, ...], tuple[type, ...]]


def kind_of(value: object) -> str:
    """Return "a string", "a number", … as messages call the type of a JSON value."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


class Shapes:
    """How many rows have which keys and types, whatever the number of rows.

    Rows are grouped by keys and types first, so a file of one form costs one dict access a row.
    """

    def __init__(self) -> None:
        self._groups: dict[_Shape, list[int]] = {}  # how many rows, and the index of the first
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
        """Return the rows whose keys or types differ from those of most, in order of line.

        Args:
            rows: those that were counted; they are gone through again only if there is an odd one.
            lines: of each row.
        """
        if len(self._groups) <= 1:
            return []
        sizes: Counter[frozenset[str]] = Counter()
        for shape, (size, _) in self._groups.items():
            sizes[frozenset(shape[0])] += size
        usual = sizes.most_common(1)[0][0]  # of equals, the one that came first
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


def find_odd_rows(rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
    """Return the rows whose keys or types differ from those of most rows, in order of line."""
    shapes = Shapes()
    for row in rows:
        shapes.add(row)
    return shapes.find_odd(rows, lines)


def _shape_of(row: Row) -> _Shape:
    return tuple(row), tuple(map(type, row.values()))


def _usual_kinds(shapes: Mapping[_Shape, Sequence[int]]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the kind of value that most rows have in each column, and the first such row."""
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
    """Yield the columns of a shape with another kind of value than most rows have."""
    for key, type_ in zip(*shape, strict=True):
        kind = _KINDS.get(type_)
        if kind is not None and kind != usual[key]:
            yield key


@dataclass(frozen=True)
class Form:
    """The keys and the kind of each column's values that the first rows of a stream have.

    Attributes:
        columns: the keys.
        kinds: of each column that was not null in all of them, and the line of one such row.
        count: how many rows were looked at.
    """

    columns: tuple[str, ...]
    kinds: dict[str, tuple[str, int]]
    count: int

    @classmethod
    def of(cls, rows: Sequence[Row], lines: Sequence[int]) -> Form:
        """Return the form that most of `rows` have."""
        odd = {row.line for row in find_odd_rows(rows, lines)}
        kinds: dict[str, tuple[str, int]] = {}
        columns: tuple[str, ...] = ()
        for row, line in zip(rows, lines, strict=True):
            if line in odd:
                continue
            columns = columns or tuple(row)
            for key, value in row.items():
                if value is not None:
                    kinds.setdefault(key, (kind_of(value), line))
        return cls(columns, kinds, len(rows) - len(odd))

    def find_odd(self, rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
        """Return those of `rows` that have another form."""
        odd = []
        for row, line in zip(rows, lines, strict=True):
            if row.keys() != set(self.columns):
                odd.append(BadRow(line, _describe_keys(tuple(row), self.columns, self.count)))
                continue
            for key, value in row.items():
                usual, since = self.kinds.get(key, (kind_of(value), line))
                if value is not None and kind_of(value) != usual:
                    odd.append(BadRow(line, _describe_kind(key, value, usual, since)))
                    break
        return odd


def _describe_keys(keys: tuple[str, ...], columns: tuple[str, ...], count: int) -> str:
    """Return how `keys` differ from the `columns` that `count` other rows have."""
    missing = [key for key in columns if key not in keys]
    extra = [key for key in keys if key not in columns]
    others = f"the {count:,} other rows" if count > 1 else "the other row"
    lacks, has = listing(map(quote, missing)), listing(map(quote, extra))
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
        f"{key!r} is {kind_of(value)} ({quote(value)}), but {usual} in most rows "
        f"(line {since} for one)"
    )
