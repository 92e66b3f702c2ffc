"""Whether the rows of a file agree: the same keys in each, one type a column.

A loader that guesses fills an odd row with nulls or turns a whole column into strings. Here the
form that most rows have is the form of the file, and the rows that differ are named.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ftlevel.data.table import BadRow, Row
from ftlevel.errors import did_you_mean, listing

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


def find_odd_rows(rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
    """Return the rows whose keys or types differ from those of most rows, in order of line.

    Rows are grouped by keys and types first, so a file of one form costs one dict access a row.
    """
    shapes: dict[_Shape, array[int]] = {}
    for index, row in enumerate(rows):
        shape = (tuple(row), tuple(map(type, row.values())))
        group = shapes.get(shape)
        if group is None:
            shapes[shape] = array("q", [index])
        else:
            group.append(index)
    if len(shapes) <= 1:
        return []
    sizes: Counter[frozenset[str]] = Counter()
    for shape, group in shapes.items():
        sizes[frozenset(shape[0])] += len(group)
    usual = sizes.most_common(1)[0][0]  # of equals, the one that came first
    regular = {shape: group for shape, group in shapes.items() if usual == frozenset(shape[0])}
    columns = next(iter(regular))[0]
    odd = [
        BadRow(lines[index], _describe_keys(shape[0], columns, sizes[usual]))
        for shape, group in shapes.items()
        if shape not in regular
        for index in group
    ]
    return sorted([*odd, *_odd_types(regular, rows, lines)], key=lambda row: row.line)


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
    lacks = listing([repr(key) for key in missing])
    has = listing([repr(key) for key in extra])
    if missing and extra:
        hint = did_you_mean(extra[0], missing).strip()
        aside = f" ({hint[0].lower()}{hint[1:]})" if hint else ""
        return f"lacks {lacks} and has {has}, unlike {others}{aside}"
    if missing:
        verb = "have" if count > 1 else "has"
        return f"lacks {lacks}, which {others} {verb} (a value may be null, the key must be there)"
    return f"has {has}, which {others} {'lack' if count > 1 else 'lacks'}"


def _odd_types(
    shapes: dict[_Shape, array[int]], rows: Sequence[Row], lines: Sequence[int]
) -> list[BadRow]:
    """Return the rows in which a column has another kind of value than in most rows."""
    kinds: dict[str, Counter[str]] = {}
    first: dict[tuple[str, str], int] = {}
    for (keys, types), group in shapes.items():
        for key, type_ in zip(keys, types, strict=True):
            if kind := _KINDS.get(type_):
                kinds.setdefault(key, Counter())[kind] += len(group)
                first[key, kind] = min(first.get((key, kind), group[0]), group[0])
    usual = {key: counts.most_common(1)[0][0] for key, counts in kinds.items()}
    odd = []
    for (keys, types), group in shapes.items():
        for key, type_ in zip(keys, types, strict=True):
            kind = _KINDS.get(type_)
            if kind is None or kind == usual[key]:
                continue
            since = lines[first[key, usual[key]]]
            odd += [
                BadRow(lines[index], _describe_kind(key, rows[index][key], usual[key], since))
                for index in group
            ]
    return odd


def _describe_kind(key: str, value: object, usual: str, since: int) -> str:
    return (
        f"{key!r} is {kind_of(value)} ({_brief(value)}), but {usual} in most rows "
        f"(line {since} for one)"
    )


def _brief(value: object) -> str:
    """Return `value` short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
