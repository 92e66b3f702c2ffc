"""ROUGE, also for text in scripts other than Latin; imports nothing of ftlevel."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


def compute_rouge(reference: str, text: str, names: Sequence[str]) -> dict[str, float]:
    """Returns ROUGE F1 by name, as the package or, if few letters are ASCII, of Unicode words."""
    letters = [letter.isascii() for letter in reference if letter.isalpha()]
    scorer = rouge_scorer(*names, is_ascii=2 * sum(letters) >= len(letters))
    return {name: score.fmeasure for name, score in scorer.score(reference, text).items()}


@functools.cache
def rouge_scorer(*names: str, is_ascii: bool) -> Any:
    """Returns the scorer of the package rouge-score; words are Unicode unless `is_ascii`."""
    from rouge_score.rouge_scorer import RougeScorer

    # the package's own tokenizer keeps only a to z and digits
    tokenizer = None if is_ascii else SimpleNamespace(tokenize=_split_unicode)
    return RougeScorer(list(names), use_stemmer=True, tokenizer=tokenizer)


_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")


def _split_unicode(text: str) -> list[str]:
    """Returns the words of `text`, or its characters in scripts without spaces, in lower case."""
    spaced = _UNSPACED.sub(r" \1 ", text.lower())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()
