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
from functools import cached_property
from itertools import islice, pairwise, permutations
from typing import Any, Literal, TypeAlias

from ftlevel.data.formats.detect import ExampleBuilder, RoleValues
from ftlevel.data.formats.examples import ClassExample, LabeledText, TaggedTokens
from ftlevel.data.formats.turns import UnusableRowError
from ftlevel.data.sources.table import BadRow, Row, Table, json_type_name
from ftlevel.errors import InputError, join_names


@dataclass(frozen=True)
class LabelSet:
    """Class names by id; an integer label is an id or, if class names are numbers, such a name."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _ids(self) -> dict[str | int, int]:
        named = list(enumerate(self.names))
        digits = [(int(name), number) for number, name in named if name.isdecimal()]
        ids: dict[str | int, int] = {name: number for number, name in named}
        ids.update(digits or [(number, number) for number, _ in named])
        return ids

    def id_of(self, label: str | int) -> int:
        """Returns the id of the class `label`; raises `KeyError` if it does not exist."""
        return self._ids[label]

    def __contains__(self, label: str | int) -> bool:
        return label in self._ids


_Label: TypeAlias = tuple[str | int, int]
"""A class of a row, and the row."""


def create_label_set(
    examples: Sequence[ClassExample], table: Table, column: str, names: Sequence[str] = ()
) -> LabelSet:
    """Returns the classes: `names`, else declared by the source, else those of `examples`.

    `names` are from the configuration or an adapter. Raises `InputError` for fewer than two
    classes, integers other than 0, 1, … without a gap, fractions, and unknown labels.
    """
    rows = _labels_of(examples)
    counts = Counter(label for label, _ in rows)
    declared = table.label_names.get(column)
    if names:
        labels = LabelSet(tuple(names))
        message = f"is not one of the {len(labels)} classes that data.labels or --adapter has"
        _check_supported(labels, rows, table, message)
        return labels
    if declared:
        labels = LabelSet(tuple(declared))
        _check_supported(labels, rows, table, f"is not one of the {len(labels)} declared classes")
        _check_two(counts, table, column)
        return labels
    _check_two(counts, table, column)
    if all(isinstance(label, int) for label in counts):
        _check_numbers({int(label) for label in counts}, rows, table, column)
        return LabelSet(tuple(str(number) for number in range(len(counts))))
    result = sorted({str(label) for label in counts})
    if fraction := next(filter(_is_fraction, result), None):
        first = next(row for label, row in rows if str(label) == fraction)
        raise InputError(
            f"{table.where(first)}: {column!r} has decimals ({fraction}). Classes are names "
            "or whole numbers. To learn a quantity: --set data.problem_type=regression."
        )
    return LabelSet(tuple(sorted(result, key=int) if all(map(str.isdecimal, result)) else result))


def keep_numeric_labels(table: Table, column: str | None, names: Sequence[str]) -> Table:
    """Returns `table`, without declared class names if the known classes `names` are numbers."""
    declared = set(table.label_names.get(column or "", ()))
    is_numbered = bool(names) and all(map(str.isdecimal, names))
    return replace(table, label_names={}) if is_numbered and declared - set(names) else table


def check_labels(labels: LabelSet, examples: Sequence[ClassExample], table: Table) -> None:
    """Raise `InputError` if an example has a class that is not in `labels` (of training)."""
    _check_supported(labels, _labels_of(examples), table, _NOT_TRAINED)


def get_invalid_labels(
    labels: LabelSet | None, examples: Sequence[Any], table: Table, column: str
) -> list[BadRow]:
    """Returns a `BadRow` per row whose label is negative, undeclared or not in `labels`.

    `labels` are the classes of the training rows; None if `examples` are the training rows.
    """
    if labels is None and (declared := table.label_names.get(column)):
        labels = LabelSet(tuple(declared))
    invalid: dict[int, BadRow] = {}
    for label, row in _labels_of(examples):
        is_negative = isinstance(label, int) and label < 0
        if is_negative or (labels is not None and label not in labels):
            location = table.lines[row]
            errors = BadRow(location, f"label {label!r} is no class", "unknown_label")
            invalid.setdefault(location, errors)
    return list(invalid.values())


def _labels_of(examples: Sequence[ClassExample]) -> list[_Label]:
    return [(label, example.row) for example in examples for label in example.classes]


def _check_supported(labels: LabelSet, rows: Sequence[_Label], table: Table, message: str) -> None:
    unsupported = [(label, row) for label, row in rows if label not in labels]
    if not unsupported:
        return
    counts = Counter(label for label, _ in unsupported)
    names = join_names(f"{label!r} ({n:,} row{'s' * (n > 1)})" for label, n in counts.most_common())
    hint = _UNLABELLED if counts.keys() <= {-1, -100} else "Remove these rows, or correct them."
    folded = {name.casefold() for name in labels.names}
    if are_default_names(labels.names):
        hint = "The model's files do not name its classes: pass them by --labels, in its order."
    elif message == _NOT_TRAINED and hint != _UNLABELLED:
        hint = f"{hint[:-1]}, or train with a list of all classes: --set 'data.labels=[…]'."
    if all(str(label).strip().casefold() in folded for label in counts):
        hint = "They differ by case only: train with --set data.gate.label_case=fold."
    message = message if len(counts) == 1 else message.replace("is n", "are n", 1)
    raise InputError(
        f"{table.where(unsupported[0][1])}: label {names} {message} ({join_names(labels.names)}). "
        f"{hint}"
    )


def are_default_names(names: Sequence[str]) -> bool:
    """Returns whether transformers made up all class names, as LABEL_0."""
    return bool(names) and all(re.fullmatch(r"LABEL_\d+", name) for name in names)


_NOT_TRAINED = "is not a class of the training rows"
_UNLABELLED = "Such numbers mark rows without a label: remove these rows."


def _check_two(counts: Counter[str | int], table: Table, column: str) -> None:
    if len(counts) < 2:
        only = next(iter(counts), None)
        raise InputError(
            f"{table.source}: {column!r} is {only!r} in all {counts.total():,} rows; "
            f"classification needs at least two classes. If the file is sorted by label, raise "
            f"--max-samples; for another column, use --map label=COLUMN."
        )


def _check_numbers(numbers: set[int], rows: Sequence[_Label], table: Table, column: str) -> None:
    if numbers == set(range(len(numbers))):
        return
    if min(numbers) < 0:
        label, row = next((label, row) for label, row in rows if int(label) < 0)
        raise InputError(
            f"{table.where(row)}: {column!r} is {label}, and classes begin at 0. {_UNLABELLED}"
        )
    gaps = list(islice((str(n) for n in range(max(numbers)) if n not in numbers), 5))
    missing = ", ".join([*gaps[:4], "…"] if len(gaps) > 4 else gaps)
    raise InputError(
        f"{table.source}: {column!r} has the classes {join_names(map(str, sorted(numbers)))}; "
        f"numbers must be 0, 1, … without a gap, and {missing} never occurs. Count from 0, or "
        f'write names: "{max(numbers)}" in quotes is one.'
    )


def _is_fraction(name: str) -> bool:
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
    """A spelling `label` of the class `name`, and the indices of the rows that have it."""

    label: str
    name: str
    rows: tuple[int, ...]


def get_label_variants(
    examples: Sequence[ClassExample], check: str, names: Iterable[str]
) -> list[LabelVariant]:
    """Returns labels that are spelling variants of another label.

    `check` is a key of `LABEL_NORMALIZERS`. `names` are the known classes; without any, the most
    frequent spelling is the name.
    """
    if check == "label_typo":
        return get_label_typos(examples, names)
    normalize = LABEL_NORMALIZERS[check]
    rows = _rows_of_labels(examples)
    name_of = {normalize(name): name for name in names}
    groups: dict[str, list[str]] = {}
    for label in rows:
        groups.setdefault(normalize(label), []).append(label)
    variants = []
    for key, labels in groups.items():
        name = name_of.get(key) or max(sorted(labels), key=lambda label: len(rows[label]))
        variants += [
            LabelVariant(x, name, tuple(rows[x])) for x in labels if x != name and x not in names
        ]
    if check == "label_case":  # label_space covers white space
        variants = [v for v in variants if v.label.strip() != v.name.strip()]
    return variants


_TYPO_RATIO = 5  # the correct label has at least this many times the rows of the typo
_MIN_LETTERS = 5  # minimum word length; in shorter words, one letter makes another word


def get_label_typos(
    examples: Sequence[ClassExample], names: Iterable[str] = ()
) -> list[LabelVariant]:
    """Returns rare labels that differ by one letter of a long word from a frequent label.

    The letter is missing, added, replaced or swapped with its neighbor, but not the first of a
    word. Characters between words also count; digits do not: `postive` is a typo of `positive`,
    `label1` not of `label2`. Known classes (`names`) are never typos.
    """
    rows = _rows_of_labels(examples)
    similar: dict[str, list[str]] = {}
    for label in dict.fromkeys([*names, *rows]):
        folded = label.casefold()
        for shorter in {folded, *(folded[:i] + folded[i + 1 :] for i in range(len(folded)))}:
            similar.setdefault(shorter, []).append(label)
    pairs = {pair for labels in similar.values() for pair in permutations(labels, 2)}
    corrected: dict[str, str] = {}
    for label, name in sorted(pairs):
        if label in names or label not in rows or not _is_typo(label.casefold(), name.casefold()):
            continue
        frequency = len(rows.get(name, ()))
        is_rare = name in names or len(rows[label]) * _TYPO_RATIO <= frequency
        best = corrected.get(label)
        if is_rare and (best is None or frequency > len(rows.get(best, ()))):
            corrected[label] = name
    return [LabelVariant(label, name, tuple(rows[label])) for label, name in corrected.items()]


def _rows_of_labels(examples: Sequence[ClassExample]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for example in examples:
        for label in example.classes:
            if isinstance(label, str):
                rows.setdefault(label, []).append(example.row)
    return rows


def _is_typo(one: str, name: str) -> bool:
    """Returns whether texts differ by one letter of a long word, or a character between words."""
    start = common_prefix_length(one, name)
    rest = common_prefix_length(one[start:][::-1], name[start:][::-1])
    difference, replaced = one[start : len(one) - rest], name[start : len(name) - rest]
    is_swap = len(difference) == 2 and difference == replaced[::-1]
    if not is_swap and max(len(difference), len(replaced)) != 1:
        return False
    before = len(re.findall(r"[^\W\d_]*$", one[:start])[0])
    after = len(re.findall(r"^[^\W\d_]*", one[len(one) - rest :])[0])
    is_series = len(difference) == len(replaced) == 1 and not after  # such as type_a, type_b
    is_number = any(map(str.isdecimal, difference + replaced))
    letters = before + min(len(difference), len(replaced)) + after
    return before > 0 and letters >= _MIN_LETTERS and not (is_series or is_number)


def common_prefix_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns how many items at the beginning of two texts or lists are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class LabelNormalizer:
    """Example builder that corrects labels; `names` maps normalized labels to class names."""

    build: ExampleBuilder
    normalize: Callable[[str], str]
    names: Mapping[str, str]

    def __call__(self, values: Any) -> Any:
        """Returns the example of the current row, its labels replaced by class names."""
        example = self.build(values)
        if isinstance(example, LabeledText) and isinstance(example.label, str):
            return replace(example, label=self._name(example.label))
        if isinstance(example, LabeledText) and isinstance(example.label, tuple):
            return replace(example, label=tuple(dict.fromkeys(map(self._name, example.label))))
        if isinstance(example, TaggedTokens):
            return replace(example, tags=tuple(map(self._name, example.tags)))
        return example

    def _name(self, label: Any) -> Any:
        return self.names.get(self.normalize(label), label) if isinstance(label, str) else label


ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


def choose_problem_type(
    table: Table, column: str, problem_type: ProblemType | Literal["auto"] = "auto"
) -> tuple[ProblemType, str]:
    """Returns `problem_type` or, if it is auto, that of the labels in `column`, and the reason.

    Lists (or, in all rows, JSON text of lists) are multi-label; numbers, some with a fraction, are
    regression. All others are single-label, also integers, which may be meant as quantities.
    """
    if problem_type != "auto":
        return problem_type, ""
    values = [_value(row, column) for row in table.rows]
    if any(type(value) is list for value in values):
        return "multi_label_classification", f"auto: {column!r} holds lists"
    if values and all(map(_is_json_list, values)):
        return "multi_label_classification", f"auto: {column!r} contains lists as JSON text"
    if column not in table.label_names and _has_quantities(values):
        return "regression", f"auto: {column!r} contains fractional numbers"
    return "single_label_classification", "auto: one class per row"


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
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError, OverflowError):
        return False
    return any(math.isfinite(n) and not n.is_integer() for n in numbers)


_WORDS = re.compile(r"\w+|[^\w\s]")
Span = tuple[int, int, str]
"""Start, end (exclusive) and label; offsets count characters."""


def split_words(text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of each word: letters and digits, or one punctuation mark."""
    return [match.span() for match in _WORDS.finditer(text)]


def create_tagged_words(values: RoleValues) -> TaggedTokens:
    """Split a text into words, and tag each by the labeled character span that contains it."""
    text, column, items = values.text("text"), repr(values.columns["spans"]), values.get("spans")
    if type(items) is not list:
        raise UnusableRowError(f"{column} is {json_type_name(items)}, not a list of spans")
    spans = sorted(_parse_span(item, f"span {i} of {column}") for i, item in enumerate(items, 1))
    for (_, end, _), (start, *_) in pairwise(spans):
        if start < end:
            raise UnusableRowError(f"two spans of {column} overlap at {start}; a word has one tag")
    words = split_words(text) or [(0, len(text))]
    tags = ["O"] * len(words)
    for span in spans:
        _tag(tags, words, text, span)
    return TaggedTokens(tuple(text[a:b] for a, b in words), tuple(tags), values.index)


def _parse_span(item: object, name: str) -> Span:
    """Returns a span from an object or list of start, end, label; errors call it `name`."""
    if isinstance(item, dict):
        if not {"start", "end", "label"} <= item.keys():
            raise UnusableRowError(f"{name} needs start, end and label (keys: {', '.join(item)})")
        item = [item["start"], item["end"], item["label"]]
    if not isinstance(item, list) or len(item) != 3:
        raise UnusableRowError(
            f"{name} is {json_type_name(item)}, not an object or a list of start, end, label"
        )
    start, end, label = item
    if type(start) is not int or type(end) is not int or type(label) is not str or not label:
        raise UnusableRowError(f"{name} is {item!r}, not two whole numbers and a name")
    if not 0 <= start < end:
        raise UnusableRowError(f"{name} goes from {start} to {end}")
    return start, end, label


def _tag(tags: list[str], spans: Sequence[tuple[int, int]], text: str, span: Span) -> None:
    begin, end, label = span
    if end > len(text):
        raise UnusableRowError(f"{label!r} goes to {end}, and the text has {len(text)} characters")
    covered = [i for i, (a, b) in enumerate(spans) if a < end and b > begin]
    if not covered:
        raise UnusableRowError(f"{label!r} at {begin} to {end} covers no word")
    for number, index in enumerate(covered):
        start, stop = spans[index]
        if start < begin or stop > end:
            word, part = text[start:stop], text[begin:end]
            raise UnusableRowError(
                f"{label!r} at {begin} to {end} cuts the word {word!r} ({part!r})"
            )
        tags[index] = f"{'I' if number else 'B'}-{label}"
