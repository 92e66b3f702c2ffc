"""The classes of a data set: their names, their numbers, and whether the splits agree on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.formats.examples import Classed
from ftlevel.data.sources.table import BadRow, Table
from ftlevel.errors import InputError, listing


@dataclass(frozen=True)
class LabelSet:
    """Classes by number.

    Attributes:
        names: the name of class 0, 1, …; of labels that are numbers, their digits.
    """

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def id_of(self, label: str | int) -> int:
        """Return the number of a class.

        Raises:
            KeyError: there is no such class.
        """
        if isinstance(label, str):
            try:
                return self.names.index(label)
            except ValueError:
                raise KeyError(label) from None
        if not 0 <= label < len(self.names):
            raise KeyError(label)
        return label

    def __contains__(self, label: str | int) -> bool:
        return label in self.names if isinstance(label, str) else 0 <= label < len(self.names)


@dataclass(frozen=True)
class _Class:
    """A class that a row has."""

    label: str | int
    row: int


def build_label_set(
    examples: Sequence[Classed], table: Table, column: str, known: Sequence[str] = ()
) -> LabelSet:
    """Find the classes of the training rows, or the tags of their words.

    Names are sorted, as numbers where all are digits. Numbers must be 0, 1, … without a gap. Names
    that the source declares for the column are taken as they are.

    Args:
        examples: the converted rows of `table`, all `Labelled`, or all `Tagged`.
        table: where they came from, for messages.
        column: the column of the label.
        known: names of the classes, where they are decided on.

    Raises:
        InputError: fewer than two classes, numbers with gaps, or fractions.
    """
    rows = _classes_of(examples)
    counts = Counter(row.label for row in rows)
    declared = table.label_names.get(column)
    if known:
        _check_declared(declared, known, table)
        labels = LabelSet(tuple(known))
        complaint = f"is not one of the {len(labels)} classes that data.labels or --adapter has"
        _check_known(labels, rows, table, complaint)
        return labels
    if declared:
        labels = LabelSet(tuple(declared))
        _check_known(labels, rows, table, f"is not one of the {len(labels)} declared classes")
        _check_two(counts, table, column)
        return labels
    _check_two(counts, table, column)
    if all(isinstance(label, int) for label in counts):
        _check_numbers({int(label) for label in counts}, rows, table, column)
        return LabelSet(tuple(str(number) for number in range(len(counts))))
    names = {str(label) for label in counts}
    if fraction := next((name for name in sorted(names) if _is_fraction(name)), None):
        first = next(row for row in rows if str(row.label) == fraction)
        raise InputError(
            f"{table.where(first.row)}: {column!r} is a fraction ({fraction}). Classes are names "
            "or whole numbers. To learn a quantity: --set data.problem_type=regression."
        )
    if all(name.isdecimal() for name in names):
        return LabelSet(tuple(sorted(names, key=int)))
    return LabelSet(tuple(sorted(names)))


def _check_declared(declared: Sequence[str] | None, names: Sequence[str], table: Table) -> None:
    """Refuse a source whose own names of the classes are others, or in another order.

    Raises:
        InputError: they are.
    """
    if declared and list(declared) != list(names):
        raise InputError(
            f"{table.where(0)}: the data declares the classes {listing(declared, 20)}, and "
            f"data.labels or --adapter has {listing(names, 20)}. Their numbers would mean other "
            "classes. Write the names themselves into the rows."
        )


def check_labels(labels: LabelSet, examples: Sequence[Classed], table: Table) -> None:
    """Raise `InputError` if a row of another split has a class that training never sees."""
    _check_known(labels, _classes_of(examples), table, "is no class of the training rows")


def find_unlabelled(
    labels: LabelSet | None, examples: Sequence[Any], table: Table, column: str
) -> list[BadRow]:
    """Return the rows whose label is no class: negative, undeclared, or not one of `labels`.

    Args:
        labels: the classes of the training rows; None if `examples` are these.
        examples: the converted rows of `table`.
        table: where they came from.
        column: the column of the label.
    """
    known: LabelSet | None = labels
    if known is None and (declared := table.label_names.get(column)):
        known = LabelSet(tuple(declared))
    strange: dict[int, BadRow] = {}
    for found in _classes_of(examples):
        negative = isinstance(found.label, int) and found.label < 0
        if negative or (known is not None and found.label not in known):
            reason = f"label {found.label!r} is no class"
            line = table.lines[found.row]
            strange.setdefault(line, BadRow(line, reason, "unknown_label"))
    return list(strange.values())


def _classes_of(examples: Sequence[Classed]) -> list[_Class]:
    """Return each class that each row has, once a row."""
    return [_Class(label, example.row) for example in examples for label in example.classes]


def _check_known(
    labels: LabelSet, examples: Sequence[_Class], table: Table, complaint: str
) -> None:
    strange = [example for example in examples if example.label not in labels]
    if not strange:
        return
    counts = Counter(example.label for example in strange)
    shown = listing(f"{label!r} ({count:,} rows)" for label, count in counts.most_common())
    verb = complaint if len(counts) == 1 else complaint.replace("is n", "are n", 1)
    hint = _UNLABELLED if counts.keys() <= {-1, -100} else "Remove these rows, or correct them."
    folded = {name.casefold() for name in labels.names}
    if all(str(label).strip().casefold() in folded for label in counts):
        hint = "They differ by case only: --set data.gate.label_case=fold makes them one."
    raise InputError(
        f"{table.where(strange[0].row)}: label {shown} {verb} ({listing(labels.names)}). {hint}"
    )


_UNLABELLED = "Such numbers mark rows without a label: remove these rows."


def _check_two(counts: Counter[str | int], table: Table, column: str) -> None:
    if len(counts) < 2:
        only = next(iter(counts), None)
        raise InputError(
            f"{table.source}: {column!r} is {only!r} in all {counts.total():,} rows; to classify "
            "takes two classes. If the file is sorted by label, raise --max-samples; if it is "
            "another column: --map label=COLUMN."
        )


def _check_numbers(
    numbers: set[int], examples: Sequence[_Class], table: Table, column: str
) -> None:
    """Raise unless `numbers` are 0, 1, … without a gap."""
    wanted = set(range(len(numbers)))
    if numbers == wanted:
        return
    if min(numbers) < 0:
        first = next(example for example in examples if int(example.label) < 0)
        raise InputError(
            f"{table.where(first.row)}: {column!r} is {first.label}, and classes begin at 0. "
            f"{_UNLABELLED}"
        )
    missing = listing(str(number) for number in sorted(set(range(max(numbers))) - numbers))
    raise InputError(
        f"{table.source}: {column!r} has the classes {listing(map(str, sorted(numbers)))}; numbers "
        f"must be 0, 1, … without a gap, and {missing} never occurs. Count from 0, or write names: "
        f'"{max(numbers)}" in quotes is one.'
    )


def _is_fraction(name: str) -> bool:
    """Tell whether a label that came as text, as from CSV, is a number that is not whole."""
    try:
        return not name.strip().isdecimal() and "." in name and float(name) is not None
    except ValueError:
        return False
