"""Scores of generated text against references."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

ROUGES = ("rouge1", "rouge2", "rougeL")
TRANSLATION_SCORES = ("chrf", "bleu")

# Written without spaces between words, so BLEU's usual tokenizer would see one word a sentence.
_BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char"}


def score_rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str = "",  # noqa: ARG001 - the signature of all scores
) -> dict[str, float]:
    """Return mean ROUGE-1, -2 and -L F1 between 0 and 1 (Lin, 2004), with Porter stemming."""
    scores = [_rouge(r, p) for r, p in zip(references, predictions, strict=True)]
    return {name: sum(s[name] for s in scores) / len(scores) for name in ROUGES}


@functools.lru_cache(maxsize=100_000)  # resampling asks for the same pairs again and again
def _rouge(reference: str, prediction: str) -> dict[str, float]:
    scores = _rouge_scorer().score(reference, prediction)
    return {name: scores[name].fmeasure for name in ROUGES}


@functools.lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGES), use_stemmer=True)


def score_translations(
    predictions: Sequence[str], references: Sequence[str], language: str = ""
) -> dict[str, float]:
    """Return chrF2 and BLEU of the whole set, between 0 and 100 as the field writes them.

    Computed by sacrebleu (Post, 2018) with its defaults: chrF with n-grams of 6 characters and
    beta 2 (Popović, 2015), BLEU-4 with exponential smoothing.

    Args:
        predictions: what the model wrote.
        references: one for each.
        language: ISO 639-1 code of the references, for BLEU's tokenizer; "" if unknown.
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu = BLEU(tokenize=_BLEU_TOKENIZERS.get(language))
    hypotheses, expected = list(predictions), [list(references)]
    return {
        "chrf": CHRF().corpus_score(hypotheses, expected).score,
        "bleu": bleu.corpus_score(hypotheses, expected).score,
    }
