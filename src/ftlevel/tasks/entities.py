"""Entities in tag sequences, and F1 over them, as conlleval and seqeval count.

Written here because seqeval has had no release since 2020 and comes as a source archive only; the
tests hold it to seqeval's figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_TAG = re.compile(r"O|[BIESLU]-.+")
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")

Entity = tuple[str, int, int]
"""Type, first word, last word."""


def are_entity_tags(names: Iterable[str]) -> bool:
    """Tell whether all `names` are of a scheme such as BIO, BIOES or BILOU."""
    names = set(names)
    return all(_TAG.fullmatch(name) for name in names) and bool(names - {"O"})


def name_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """Return what the scheme of entity tags is called: by their letters, and where B- stands.

    In IOB1 (Ramshaw and Marcus, 1995) B- opens an entity only behind another of its type; in IOB2
    each begins with it.
    """
    letters: set[str] = set()
    opens_anew = False  # B- where IOB1 has I-
    for tags in sentences:
        before = "O"
        for tag in tags:
            letters.add(tag[0])
            opens_anew = opens_anew or (tag[0] == "B" and before[2:] != tag[2:])
            before = tag
    if letters & {"L", "U"}:
        return "BILOU"
    if letters & {"E", "S"}:
        return "IOBES"
    if "B" not in letters:
        return "IO"
    return "IOB2" if opens_anew else "IOB1"


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a sentence; an I- where none is open begins one, as in conlleval."""
    found: list[Entity] = []
    begin, before, type_before = 0, "O", ""
    for index, name in enumerate([*tags, "O"]):
        tag, _, type_ = name.partition("-")
        changed = type_ != type_before
        open_before = before != "O"
        if open_before and (before in _ENDS or tag in _BEGINS or tag == "O" or changed):
            found.append((type_before, begin, index - 1))
            open_before = False
        if tag != "O" and not open_before:
            begin = index
        before, type_before = tag, type_
    return found


def score_entities(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return micro-averaged precision, recall and F1 over whole entities, between 0 and 1."""
    right = expected = given = 0
    for tags, guesses in zip(true, predicted, strict=True):
        entities, guessed = set(find_entities(tags)), set(find_entities(guesses))
        right += len(entities & guessed)
        expected += len(entities)
        given += len(guessed)
    precision = right / given if given else 0.0
    recall = right / expected if expected else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
