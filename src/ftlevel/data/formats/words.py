"""Words of a text, and tags for them from spans of characters, as annotation tools write them.

Words are split the same way wherever a text is tagged, in training as in `ftlevel predict`; it
knows no tokenizer. A span becomes B- and I- tags of its words (IOB2).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ftlevel.data.formats.examples import Tagged
from ftlevel.data.formats.roles import Roles
from ftlevel.data.formats.turns import Unusable
from ftlevel.data.sources.uniform import kind_of

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
