"""Labels that are one class in several spellings: with white space around them, in another case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.data.formats.detect import Build
from ftlevel.data.formats.examples import Classed, Labelled, Tagged

SPELLINGS: dict[str, Callable[[str], str]] = {
    "label_space": str.strip,
    "label_case": lambda label: label.strip().casefold(),
}
"""Field of `config.gate` → what is the same of labels that differ by no more."""


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
    same = SPELLINGS[check]
    rows: dict[str, list[int]] = {}
    for example in examples:
        for label in example.classes:
            if isinstance(label, str):
                rows.setdefault(label, []).append(example.row)
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
