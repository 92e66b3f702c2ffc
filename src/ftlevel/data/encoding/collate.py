"""Collate encoded rows into right-padded batches, and choose the padding token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.examples import PlainText
from ftlevel.data.sources.lines import LazySequence
from ftlevel.errors import InputError


class Collator:
    """Pad rows to the longest row of the batch; any valid `pad_id` works, as padding is masked."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` `(batch, seq)`, `labels` and optional tensors.

        Each branch of a row is one sequence. `labels` is `(batch,)` for one value per row,
        `(batch, n)` for n values, or `(batch, target)` padded with -100 for tokens. `verdicts` is
        `(batch, 3)`. Teacher outputs `known` (float32) and `ids`, and `signals` `(targets, n)`, are
        concatenated over all targets.
        """
        verdicts = [verdict for row in rows for verdict in row.verdicts]
        taught = [row.teacher for row in rows if row.teacher is not None]
        signals = [row.signals for row in rows if row.signals is not None]
        rows = [branch for row in rows for branch in row.branches]
        batch = {
            "input_ids": pad([r.input_ids for r in rows], self.pad_id),
            "attention_mask": pad([[1] * len(r.input_ids) for r in rows], 0),
        }
        for name in rows[0].extras:
            batch[name] = pad([r.extras[name] for r in rows], 0)
        labels: list[Any] = [r.labels for r in rows]
        if isinstance(labels[0], list):
            batch["labels"] = pad(labels, IGNORED)
        else:
            batch["labels"] = torch.tensor(labels)
        if verdicts:
            batch["verdicts"] = torch.tensor(verdicts)
        if signals:
            batch["signals"] = torch.cat([torch.tensor(own, dtype=torch.float) for own in signals])
        if taught:
            for name, kind in (("known", torch.float32), ("ids", torch.long)):
                parts = [torch.tensor(expected[name], dtype=kind) for expected in taught]
                batch[name] = torch.cat(parts)
        return batch


class CollatorWithRows(Collator):
    """A `Collator` that also returns the rows, so that an error can name the failing row."""

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return the batch with `rows`; their `contrasts` are a separate batch."""
        contrasts = [other for row in rows for other in row.contrasts]
        batch: dict[str, Any] = {**super().__call__(rows), "rows": list(rows)}
        return {**batch, "contrasts": [super().__call__(contrasts)]} if contrasts else batch


def pad(rows: Sequence[list[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Return `rows` as a tensor `(batch, longest)`, padded with `value` on the right or left."""
    longest = max(len(row) for row in rows)
    filled = [
        [value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


_RESERVED = tuple(
    """
    <|finetune_right_pad_id|> <|pad|> <pad> [PAD] <|endofprompt|> <|reserved_special_token_0|>
    <|fim_pad|> <unk>
    """.split()
)


def separate_pad_from_eos(tokenizer: Any) -> Choice | None:
    """Replace a padding token equal to EOS (mutated), for models that detect the end by padding."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    vocabulary = tokenizer.get_vocab()
    known = (*_RESERVED, tokenizer.bos_token, *sorted(vocabulary, key=vocabulary.__getitem__)[:2])
    tokenizer.pad_token = next(t for t in known if t in vocabulary and t != tokenizer.eos_token)
    return Choice("pad token", tokenizer.pad_token, "EOS is read as the end of an answer")


def ensure_pad_token(tokenizer: Any) -> Choice | None:
    """Set a padding token on `tokenizer` (mutated) if it has none, and return the log line.

    Prefer a reserved token of the vocabulary, so that the embedding does not grow, and fall back to
    EOS. Labels are masked by position, so EOS remains a label.
    """
    if tokenizer.pad_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in _RESERVED:
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return Choice("pad token", token, "the tokenizer has none")
    tokenizer.pad_token = tokenizer.eos_token
    return Choice(
        "pad token", tokenizer.eos_token, "the tokenizer has none; EOS labels are still supervised"
    )


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
