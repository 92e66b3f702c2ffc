"""Labels that are one class in several spellings: white space around them, case, or a typo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from ftlevel.data.formats.detect import Build
from ftlevel.data.formats.examples import Classed, Labelled, Tagged

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
