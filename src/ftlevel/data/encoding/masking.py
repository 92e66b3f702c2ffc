"""Masked language modeling with reproducible masks.

BERT's rule (Devlin et al., 2019, section 3.1): predict 15 % of the tokens, of which 80 % become the
mask token, 10 % a random token, and 10 % stay unchanged. Masks depend only on seed, epoch and row,
so a resumed run draws the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.examples import PlainText
from ftlevel.data.sources.lines import LazySequence
from ftlevel.errors import InputError

_BATCH = 1_000
_MASKED, _RANDOM = 0.8, 0.1
_FIXED = 0  # epoch number of the validation rows; training epochs count from 1


class MaskedRows(LazySequence[Encoded]):
    """Rows masked on access; set `epoch` (from 0) before the first row of each epoch is read.

    `share` is the fraction of tokens that are predicted, at least one per row.
    """

    def __init__(self, rows: Sequence[Encoded], tokenizer: Any, *, share: float, seed: int) -> None:
        self.rows = rows
        self.share = share
        self.seed = seed
        self.epoch = 0
        self._mask = int(tokenizer.mask_token_id)
        self._special = np.array(sorted(tokenizer.all_special_ids))
        self._vocabulary = np.setdiff1d(np.arange(len(tokenizer)), self._special)

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        return self._draw(at, self.epoch + 1)

    def fixed(self) -> list[Encoded]:
        """Return all rows with masks that do not depend on the epoch, for evaluation."""
        return [self._draw(index, _FIXED) for index in range(len(self))]

    def count_hidden(self) -> int:
        """Return the number of predicted tokens per epoch."""
        return sum(
            self._count(int((~np.isin(row.input_ids, self._special)).sum())) for row in self.rows
        )

    def _count(self, candidates: int) -> int:
        return max(1, round(self.share * candidates))

    def _draw(self, index: int, epoch: int) -> Encoded:
        generator = np.random.default_rng((self.seed, epoch, index))
        row = self.rows[index]
        ids = np.array(row.input_ids)
        candidates = np.flatnonzero(~np.isin(ids, self._special))
        count = self._count(len(candidates))
        chosen = generator.choice(candidates, count, replace=False)
        labels = np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        lot = generator.random(count)
        words = generator.choice(self._vocabulary, count)
        masked, random = lot < _MASKED, lot >= 1 - _RANDOM
        ids[chosen[masked]] = self._mask
        ids[chosen[random]] = words[random]
        return replace(row, input_ids=ids.tolist(), labels=labels.tolist())


def encode_masked(
    tokenizer: Any, examples: Sequence[PlainText], length: int | None
) -> list[Encoded]:
    """Encode texts; a text of more than `length` tokens becomes several rows."""
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no mask token, which --task masked-lm "
            "hides words with. Use a model such as BERT, RoBERTa or ModernBERT."
        )
    special = set(tokenizer.all_special_ids)
    rows = []
    for start in range(0, len(examples), _BATCH):
        chunk = examples[start : start + _BATCH]
        cut = {"truncation": True, "max_length": length} if length else {}
        encoding = tokenizer([e.text for e in chunk], return_overflowing_tokens=True, **cut)
        skipped = ("input_ids", "attention_mask", "overflow_to_sample_mapping")
        further = [name for name in encoding if name not in skipped]
        for index, ids in enumerate(encoding["input_ids"]):
            if special.issuperset(ids):
                continue
            example = chunk[encoding["overflow_to_sample_mapping"][index]]
            extras = {name: encoding[name][index] for name in further}
            rows.append(Encoded(ids, [IGNORED] * len(ids), example.row, extras))
    return rows
