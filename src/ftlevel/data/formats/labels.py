"""The classes of a data set: their names, their numbers, and whether the splits agree on them.

Labels that are one class in several spellings: white space around them, case, or a typo.

What the label of a text is: one class, several, or a quantity.

Words of a text, and tags for them from spans of characters, as annotation tools write them.

Words are split the same way wherever a text is tagged, in training as in `ftlevel predict`; it
knows no tokenizer. A span becomes B- and I- tags of its words (IOB2).
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

from ftlevel.data.formats.detect import Build
from ftlevel.data.formats.examples import Classed, Labelled, Roles, Tagged
from ftlevel.data.formats.turns import Unusable
from ftlevel.data.sources.table import BadRow, Row, Table
from ftlevel.data.sources.uniform import kind_of
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


SPELLINGS: dict[str, Callable[[str], str]] = {
    "label_space": str.strip,
    "label_case": lambda label: label.strip().casefold(),
    "label_typo": str,
}
"""Field of `config.gate` → what is the same of labels that differ by no more; of a typo nothing."""


@dataclass(frozen=True)
class Variant:
    """A label that is another one in another spelling.

    Attributes:
        label: as it stands there.
        name: as the class is called.
        rows: indices of the examples with it.
    """

    label: str
    name: str
    rows: tuple[int, ...]


def find_variants(
    examples: Sequence[Classed], check: str, names: Iterable[str] = ()
) -> list[Variant]:
    """Return the labels that differ from another one by no more than `check` says.

    Args:
        examples: with classes.
        check: a key of `SPELLINGS`.
        names: of the classes that are known; where there are none, the usual spelling is the name.
    """
    if check == "label_typo":
        return find_typos(examples, names)
    same = SPELLINGS[check]
    rows = _rows_of_labels(examples)
    known = {same(name): name for name in names}
    groups: dict[str, list[str]] = {}
    for label in rows:
        groups.setdefault(same(label), []).append(label)
    found = []
    for key, labels in groups.items():
        name = known.get(key) or max(sorted(labels), key=lambda label: len(rows[label]))
        found += [Variant(x, name, tuple(rows[x])) for x in labels if x != name and x not in names]
    if check == "label_case":  # white space alone is the other check's
        found = [v for v in found if v.label.strip() != v.name.strip()]
    return found


_RARE = 5  # a misspelled label has at most a fifth of the rows of the right one
_LETTERS = 5  # in a word of fewer, one letter makes another word


def find_typos(examples: Sequence[Classed], names: Iterable[str] = ()) -> list[Variant]:
    """Return the rare labels that differ from a frequent one by one letter of a long word.

    The letter may be missing, added, another or exchanged with its neighbor; the first one of a
    word is the same. Labels that differ only by what stands between their words count too, numbers
    never: `postive` is `positive`, but `label1` is not `label2` and `B-PERSON` not `I-PERSON`.

    Args:
        examples: with classes.
        names: of the classes that are known, of which none is misspelled.
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
    return [Variant(label, name, tuple(rows[label])) for label, name in found.items()]


def _rows_of_labels(examples: Sequence[Classed]) -> dict[str, list[int]]:
    """Return the indices of the examples of each label that is a text."""
    rows: dict[str, list[int]] = {}
    for example in examples:
        for label in example.classes:
            if isinstance(label, str):
                rows.setdefault(label, []).append(example.row)
    return rows


def _is_typo(one: str, other: str) -> bool:
    """Tell whether two texts differ by one slip inside a long word, or between their words."""
    begin = _count_common(one, other)
    rest = _count_common(one[begin:][::-1], other[begin:][::-1])
    cut, other_cut = one[begin : len(one) - rest], other[begin : len(other) - rest]
    is_swap = len(cut) == 2 and cut == other_cut[::-1]
    if not is_swap and max(len(cut), len(other_cut)) != 1:
        return False
    before = len(re.findall(r"[^\W\d_]*$", one[:begin])[0])
    after = len(re.findall(r"^[^\W\d_]*", one[len(one) - rest :])[0])
    is_series = len(cut) == len(other_cut) == 1 and not after  # as type_a and type_b, typea, typeb
    is_number = any(map(str.isdecimal, cut + other_cut))
    letters = before + min(len(cut), len(other_cut)) + after
    return before > 0 and letters >= _LETTERS and not (is_series or is_number)


def _count_common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


@dataclass(frozen=True)
class FoldLabels:
    """Builds an example and gives its labels the names of their classes.

    Attributes:
        build: makes the example of a row.
        same: what is the same of the spellings of a class.
        names: by that, the name of the class.
    """

    build: Build
    same: Callable[[str], str]
    names: Mapping[str, str]

    def __call__(self, roles: Any) -> Any:
        """Return the example."""
        example = self.build(roles)
        if isinstance(example, Labelled) and isinstance(example.label, str):
            return replace(example, label=self._name(example.label))
        if isinstance(example, Labelled) and isinstance(example.label, tuple):
            return replace(example, label=tuple(dict.fromkeys(map(self._name, example.label))))
        if isinstance(example, Tagged):
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
    """Return the problem type of a label column, and why.

    Lists, and JSON lists in the text of all rows, are several labels a row. Numbers with a fraction
    are quantities. Everything else is a class: whole numbers may be grades as well, which nobody
    but the user can know.
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
    """Tell whether all values are numbers, as text too, and one is not whole."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        return False
    return any(math.isfinite(n) and not n.is_integer() for n in numbers)


_WORDS = re.compile(r"\w+|[^\w\s]")
Span = tuple[int, int, str]
"""First character, the one behind the last, label."""


def split_words(text: str) -> list[tuple[int, int]]:
    """Return where each word begins and ends: letters and digits together, other marks alone."""
    return [match.span() for match in _WORDS.finditer(text)]


def build_spans(roles: Roles) -> Tagged:
    """Return the words of a text with the tags of its spans."""
    text, column = roles.text("text"), repr(roles.columns["spans"])
    found = roles.get("spans")
    if type(found) is not list:
        raise Unusable(f"{column} is {kind_of(found)}, not a list of spans")
    spans = sorted(_read_span(item, f"span {i} of {column}") for i, item in enumerate(found, 1))
    for (_, end, _), (begin, *_) in pairwise(spans):
        if begin < end:
            raise Unusable(f"two spans of {column} overlap at {begin}; a word has one tag")
    words = split_words(text) or [(0, len(text))]
    tags = ["O"] * len(words)
    for span in spans:
        _tag(tags, words, text, span)
    return Tagged(tuple(text[a:b] for a, b in words), tuple(tags), roles.index)


def _read_span(item: object, what: str) -> Span:
    """Return a span: `{"start", "end", "label"}`, or a list of the three."""
    parts: Sequence[Any]
    if isinstance(item, dict):
        if not {"start", "end", "label"} <= item.keys():
            raise Unusable(f"{what} needs start, end and label (keys: {', '.join(item)})")
        parts = [item["start"], item["end"], item["label"]]
    elif isinstance(item, list) and len(item) == 3:
        parts = item
    else:
        raise Unusable(f"{what} is {kind_of(item)}, not an object or a list of start, end, label")
    begin, end, label = parts
    if type(begin) is not int or type(end) is not int or type(label) is not str or not label:
        raise Unusable(f"{what} is {list(parts)!r}, not two whole numbers and a name")
    if not 0 <= begin < end:
        raise Unusable(f"{what} goes from {begin} to {end}")
    return begin, end, label


def _tag(tags: list[str], words: Sequence[tuple[int, int]], text: str, span: Span) -> None:
    """Write the tags of a span, which may have white space around it but cuts no word."""
    begin, end, label = span
    if end > len(text):
        raise Unusable(f"{label!r} goes to {end}, and the text has {len(text)} characters")
    inside = [i for i, (a, b) in enumerate(words) if a < end and b > begin]
    cut = next((i for i in inside if words[i][0] < begin or words[i][1] > end), None)
    if cut is not None:
        word, part = text[slice(*words[cut])], text[begin:end]
        raise Unusable(f"{label!r} at {begin} to {end} cuts the word {word!r} ({part!r})")
    if not inside:
        raise Unusable(f"{label!r} at {begin} to {end} covers no word")
    for number, index in enumerate(inside):
        tags[index] = f"{'I' if number else 'B'}-{label}"
