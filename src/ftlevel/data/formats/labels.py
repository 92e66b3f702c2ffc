"""Labels of a dataset: problem type, set of classes, spelling variants, and tags from spans.

Spans of characters become B- and I- tags of words (IOB2). Words are split in the same way in
training and prediction, independently of the tokenizer.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Any, Literal, TypeAlias

from ftlevel.data.formats.detect import ExampleBuilder
from ftlevel.data.formats.examples import ClassExample, LabeledText, RoleValues, TaggedTokens
from ftlevel.data.formats.turns import UnusableRowError
from ftlevel.data.sources.table import BadRow, Row, Table, json_type_name
from ftlevel.errors import InputError, join_names


@dataclass(frozen=True)
class LabelSet:
    """Names of the classes by id; numeric labels are named by their digits."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def id_of(self, label: str | int) -> int:
        """Return the id of a class; raise `KeyError` if it does not exist."""
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
    """A class of a row."""

    label: str | int
    row: int


def build_label_set(
    examples: Sequence[ClassExample], table: Table, column: str, known: Sequence[str] = ()
) -> LabelSet:
    """Return the classes of the training examples: `known`, declared by the source, or as found.

    Found names are sorted, as numbers if all are digits. Integer labels must be 0, 1, … without a
    gap. `known` are classes from the configuration or an adapter. `table` and `column` are used in
    messages.

    Raises:
        InputError: fewer than two classes, gaps between numbers, fractions, or unknown labels.
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
    """Raise `InputError` if the source declares other class names, or another order."""
    if declared and list(declared) != list(names):
        raise InputError(
            f"{table.where(0)}: the data declares the classes {join_names(declared, 20)}, and "
            f"data.labels or --adapter has {join_names(names, 20)}. Their numbers would mean other "
            "classes. Write the names themselves into the rows."
        )


def check_labels(labels: LabelSet, examples: Sequence[ClassExample], table: Table) -> None:
    """Raise `InputError` if an example has a class that the training rows lack."""
    _check_known(labels, _classes_of(examples), table, "is not a class of the training rows")


def find_invalid_labels(
    labels: LabelSet | None, examples: Sequence[Any], table: Table, column: str
) -> list[BadRow]:
    """Return the rows whose label is negative, undeclared or missing from `labels`.

    `labels` are the classes of the training rows; None if `examples` are the training rows.
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


def _classes_of(examples: Sequence[ClassExample]) -> list[_Class]:
    """Return all (class, row) pairs."""
    return [_Class(label, example.row) for example in examples for label in example.classes]


def _check_known(
    labels: LabelSet, examples: Sequence[_Class], table: Table, complaint: str
) -> None:
    strange = [example for example in examples if example.label not in labels]
    if not strange:
        return
    counts = Counter(example.label for example in strange)
    shown = join_names(f"{label!r} ({count:,} rows)" for label, count in counts.most_common())
    verb = complaint if len(counts) == 1 else complaint.replace("is n", "are n", 1)
    hint = _UNLABELLED if counts.keys() <= {-1, -100} else "Remove these rows, or correct them."
    folded = {name.casefold() for name in labels.names}
    if all(str(label).strip().casefold() in folded for label in counts):
        hint = "They differ by case only: --set data.gate.label_case=fold merges them."
    raise InputError(
        f"{table.where(strange[0].row)}: label {shown} {verb} ({join_names(labels.names)}). {hint}"
    )


_UNLABELLED = "Such numbers mark rows without a label: remove these rows."


def _check_two(counts: Counter[str | int], table: Table, column: str) -> None:
    if len(counts) < 2:
        only = next(iter(counts), None)
        raise InputError(
            f"{table.source}: {column!r} is {only!r} in all {counts.total():,} rows; "
            f"classification needs at least two classes. If the file is sorted by label, raise "
            f"--max-samples; for another column, use --map label=COLUMN."
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
    missing = join_names(str(number) for number in sorted(set(range(max(numbers))) - numbers))
    raise InputError(
        f"{table.source}: {column!r} has the classes {join_names(map(str, sorted(numbers)))}; "
        "numbers "
        f"must be 0, 1, … without a gap, and {missing} never occurs. Count from 0, or write names: "
        f'"{max(numbers)}" in quotes is one.'
    )


def _is_fraction(name: str) -> bool:
    """Return whether a label that is text, as in CSV, is a number with a decimal point."""
    try:
        return not name.strip().isdecimal() and "." in name and float(name) is not None
    except ValueError:
        return False


LABEL_NORMALIZERS: dict[str, Callable[[str], str]] = {
    "label_space": str.strip,
    "label_case": lambda label: label.strip().casefold(),
    "label_typo": str,
}
"""Normalization of labels by field of `config.gate`; labels with equal results are variants."""


@dataclass(frozen=True)
class LabelVariant:
    """A spelling `label` of the class `name`, and the indices of its rows."""

    label: str
    name: str
    rows: tuple[int, ...]


def find_variants(
    examples: Sequence[ClassExample], check: str, names: Iterable[str] = ()
) -> list[LabelVariant]:
    """Return labels that are variants of another label under `check`, a key of `LABEL_NORMALIZERS`.

    `names` are the known classes. Without any, the most frequent spelling is the name.
    """
    if check == "label_typo":
        return find_typos(examples, names)
    same = LABEL_NORMALIZERS[check]
    rows = _rows_of_labels(examples)
    known = {same(name): name for name in names}
    groups: dict[str, list[str]] = {}
    for label in rows:
        groups.setdefault(same(label), []).append(label)
    found = []
    for key, labels in groups.items():
        name = known.get(key) or max(sorted(labels), key=lambda label: len(rows[label]))
        found += [
            LabelVariant(x, name, tuple(rows[x])) for x in labels if x != name and x not in names
        ]
    if check == "label_case":  # label_space covers white space
        found = [v for v in found if v.label.strip() != v.name.strip()]
    return found


_RARE = 5  # the correct label has at least this many times the rows of the typo
_LETTERS = 5  # minimum word length; in shorter words, one letter makes another word


def find_typos(examples: Sequence[ClassExample], names: Iterable[str] = ()) -> list[LabelVariant]:
    """Return rare labels that differ by one letter of a long word from a frequent label.

    The letter is missing, added, replaced or swapped with its neighbor, but not the first of a
    word. Different characters between words also count; digits do not. `postive` is a typo of
    `positive`, but `label1` is not of `label2`, nor `B-PERSON` of `I-PERSON`. Known classes
    (`names`) are never typos.
    """
    rows = _rows_of_labels(examples)
    near: dict[str, list[str]] = {}
    for label in dict.fromkeys([*names, *rows]):
        folded = label.casefold()
        for shorter in {folded, *(folded[:i] + folded[i + 1 :] for i in range(len(folded)))}:
            near.setdefault(shorter, []).append(label)
    pairs = {pair for labels in near.values() for pair in permutations(labels, 2)}
    found: dict[str, str] = {}
    for label, name in sorted(pairs):
        known = name in names
        if label in names or not rows.get(label) or not _is_typo(label.casefold(), name.casefold()):
            continue
        is_rare = known or len(rows[label]) * _RARE <= len(rows.get(name, ()))
        best = found.get(label)
        if is_rare and (best is None or len(rows.get(name, ())) > len(rows.get(best, ()))):
            found[label] = name
    return [LabelVariant(label, name, tuple(rows[label])) for label, name in found.items()]


def _rows_of_labels(examples: Sequence[ClassExample]) -> dict[str, list[int]]:
    """Return the row indices of each string label."""
    rows: dict[str, list[int]] = {}
    for example in examples:
        for label in example.classes:
            if isinstance(label, str):
                rows.setdefault(label, []).append(example.row)
    return rows


def _is_typo(one: str, other: str) -> bool:
    """Return whether two texts differ by one typo within a long word, or between their words."""
    begin = _count_common(one, other)
    rest = _count_common(one[begin:][::-1], other[begin:][::-1])
    cut, other_cut = one[begin : len(one) - rest], other[begin : len(other) - rest]
    is_swap = len(cut) == 2 and cut == other_cut[::-1]
    if not is_swap and max(len(cut), len(other_cut)) != 1:
        return False
    before = len(re.findall(r"[^\W\d_]*$", one[:begin])[0])
    after = len(re.findall(r"^[^\W\d_]*", one[len(one) - rest :])[0])
    is_series = len(cut) == len(other_cut) == 1 and not after  # such as type_a, type_b
    is_number = any(map(str.isdecimal, cut + other_cut))
    letters = before + min(len(cut), len(other_cut)) + after
    return before > 0 and letters >= _LETTERS and not (is_series or is_number)


def _count_common(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


@dataclass(frozen=True)
class LabelNormalizer:
    """Builder that replaces spelling variants of labels by the names of their classes.

    `same` normalizes a label, and `names` maps the result to the class name.
    """

    build: ExampleBuilder
    same: Callable[[str], str]
    names: Mapping[str, str]

    def __call__(self, roles: Any) -> Any:
        """Return the example of a row, with replaced labels."""
        example = self.build(roles)
        if isinstance(example, LabeledText) and isinstance(example.label, str):
            return replace(example, label=self._name(example.label))
        if isinstance(example, LabeledText) and isinstance(example.label, tuple):
            return replace(example, label=tuple(dict.fromkeys(map(self._name, example.label))))
        if isinstance(example, TaggedTokens):
            return replace(example, tags=tuple(map(self._name, example.tags)))
        return example

    def _name(self, label: Any) -> Any:
        return self.names.get(self.same(label), label) if isinstance(label, str) else label


ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


def choose_problem_type(
    table: Table, column: str, wish: ProblemType | Literal["auto"] = "auto"
) -> tuple[ProblemType, str]:
    """Return the problem type of a label column, and the reason.

    Lists, also as JSON text in all rows, are multi-label; numbers with a fraction are regression.
    All others are single-label, including integers, which may be meant as quantities.
    """
    if wish != "auto":
        return wish, ""
    values = [_value(row, column) for row in table.rows]
    if any(type(value) is list for value in values):
        return "multi_label_classification", f"auto: {column!r} holds lists"
    if values and all(map(_is_json_list, values)):
        return "multi_label_classification", f"auto: {column!r} holds lists as JSON text"
    if column not in table.label_names and _has_quantities(values):
        return "regression", f"auto: {column!r} holds numbers with a fraction"
    return "single_label_classification", "auto: one name or whole number a row"


def _value(row: Row, column: str) -> Any:
    value: Any = row
    for part in (column,) if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_json_list(value: Any) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        return type(json.loads(value)) is list
    except ValueError:
        return False


def _has_quantities(values: Sequence[Any]) -> bool:
    """Return whether all values are numbers or numeric text, and one has a fraction."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        return False
    return any(math.isfinite(n) and not n.is_integer() for n in numbers)


_WORDS = re.compile(r"\w+|[^\w\s]")
Span = tuple[int, int, str]
"""Start, end (exclusive) and label; offsets count characters."""


def split_words(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each word: a run of letters and digits, or one punctuation mark."""
    return [match.span() for match in _WORDS.finditer(text)]


def build_spans(roles: RoleValues) -> TaggedTokens:
    """Return the words of a text with the tags of its spans."""
    text, column = roles.text("text"), repr(roles.columns["spans"])
    found = roles.get("spans")
    if type(found) is not list:
        raise UnusableRowError(f"{column} is {json_type_name(found)}, not a list of spans")
    spans = sorted(_read_span(item, f"span {i} of {column}") for i, item in enumerate(found, 1))
    for (_, end, _), (begin, *_) in pairwise(spans):
        if begin < end:
            raise UnusableRowError(f"two spans of {column} overlap at {begin}; a word has one tag")
    words = split_words(text) or [(0, len(text))]
    tags = ["O"] * len(words)
    for span in spans:
        _tag(tags, words, text, span)
    return TaggedTokens(tuple(text[a:b] for a, b in words), tuple(tags), roles.index)


def _read_span(item: object, what: str) -> Span:
    """Return a span from `{"start", "end", "label"}` or a list of the three."""
    parts: Sequence[Any]
    if isinstance(item, dict):
        if not {"start", "end", "label"} <= item.keys():
            raise UnusableRowError(f"{what} needs start, end and label (keys: {', '.join(item)})")
        parts = [item["start"], item["end"], item["label"]]
    elif isinstance(item, list) and len(item) == 3:
        parts = item
    else:
        raise UnusableRowError(
            f"{what} is {json_type_name(item)}, not an object or a list of start, end, label"
        )
    begin, end, label = parts
    if type(begin) is not int or type(end) is not int or type(label) is not str or not label:
        raise UnusableRowError(f"{what} is {list(parts)!r}, not two whole numbers and a name")
    if not 0 <= begin < end:
        raise UnusableRowError(f"{what} goes from {begin} to {end}")
    return begin, end, label


def _tag(tags: list[str], words: Sequence[tuple[int, int]], text: str, span: Span) -> None:
    """Write the tags of a span into `tags`; raise `UnusableRowError` if it cuts a word."""
    begin, end, label = span
    if end > len(text):
        raise UnusableRowError(f"{label!r} goes to {end}, and the text has {len(text)} characters")
    inside = [i for i, (a, b) in enumerate(words) if a < end and b > begin]
    cut = next((i for i in inside if words[i][0] < begin or words[i][1] > end), None)
    if cut is not None:
        word, part = text[slice(*words[cut])], text[begin:end]
        raise UnusableRowError(f"{label!r} at {begin} to {end} cuts the word {word!r} ({part!r})")
    if not inside:
        raise UnusableRowError(f"{label!r} at {begin} to {end} covers no word")
    for number, index in enumerate(inside):
        tags[index] = f"{'I' if number else 'B'}-{label}"
