"""docstring-pairs: two summaries of a function, its authors' and a copied sentence.

Built from docstring-summary. Both answers are real text of about the same length, so length and
fluency do not distinguish them: the second is true, but not a summary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from data_sets.docstrings import build_summaries
from data_sets.sources import Sources
from data_sets.splits import Row, Splits

REQUEST = "Summarize what this function does in one line.\n\n"
SIZES = {"train": 160, "validation": 40, "test": 40}
LONGEST = 75  # words of a text
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")
_NO_PROSE = re.compile(r"[_=<>\[\]{}\\]{2}|:math|::")


def build_pairs(name: str, sources: Sources) -> Splits:  # noqa: ARG001 - builders get their name
    """Build docstring-pairs from the splits of docstring-summary."""
    summaries = build_summaries("docstring-summary", sources)
    return Splits(**{split: choose_pairs(rows, SIZES[split]) for split, rows in summaries.parts()})


def choose_pairs(rows: Iterable[Row], most: int) -> list[Row]:
    """Return at most so many pairs, in the order of the SHA-1 of prompt and preferred answer."""
    pairs = [pair for row in rows if (pair := make_pair(row)) is not None]
    return sorted(pairs, key=_order)[:most]


def make_pair(row: Row) -> Row | None:
    """Return the row as a pair, or None where its text has no sentence for it."""
    document, summary = str(row["document"]).strip(), str(row["summary"]).strip()
    wanted = _words(summary)
    others = [s for s in _sentences(document) if len(_words(s) & wanted) < 0.6 * len(wanted)]
    if not others or len(document.split()) > LONGEST or not 4 <= len(summary.split()) <= 20:
        return None
    rejected = min(others, key=lambda s: (abs(len(s) - len(summary)), s))
    if abs(len(rejected) - len(summary)) > 0.35 * len(summary):
        return None
    return {
        "prompt": REQUEST + document,
        "chosen": summary,
        "rejected": rejected,
        "name": row["name"],
        "library": row["library"],
    }


def _sentences(text: str) -> list[str]:
    """Return the sentences of 4 to 25 words that are prose."""
    parts = _SENTENCE_END.split(text)
    return [
        part
        for part in parts
        if 4 <= len(part.split()) <= 25 and part.endswith(".") and not _NO_PROSE.search(part)
    ]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _order(pair: Row) -> str:
    return hashlib.sha1((str(pair["prompt"]) + str(pair["chosen"])).encode()).hexdigest()
