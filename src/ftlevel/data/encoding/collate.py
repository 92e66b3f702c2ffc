"""Collate encoded rows into right-padded batches, and choose the padding token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import extra_inputs, split_batches
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.examples import PlainText
from ftlevel.data.sources.lines import RowView
from ftlevel.errors import InputError


class Collator:
    """Data collator; pads on the right with `pad_id` (any valid id works, as padding is masked)."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `attention_mask` `(batch, seq)`, `labels` and optional tensors.

        Each sequence of a row is a batch entry. `labels` is `(batch,)`, `(batch, n)` for n values
        each, or `(batch, target)` for token ids, padded with -100. The arrays of `loss_inputs` are
        concatenated.
        """
        inputs: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            for name, values in row.loss_inputs.items():
                array = torch.tensor(values)
                array = array.float() if array.is_floating_point() else array.long()
                inputs.setdefault(name, []).append(array)
        rows = [sequence for row in rows for sequence in row.sequences]
        labels: list[Any] = [r.labels for r in rows]
        return {
            "input_ids": pad([r.input_ids for r in rows], self.pad_id),
            "attention_mask": pad([[1] * len(r.input_ids) for r in rows], 0),
            **{name: pad([r.extras[name] for r in rows], 0) for name in rows[0].extras},
            "labels": (
                pad(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
            ),
            **{name: torch.cat(tensors) for name, tensors in inputs.items()},
        }


class CollatorWithRows(Collator):
    """A `Collator` whose batches include their rows, so that an error can name the failing row."""

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Returns the batch plus `rows`."""
        return {**super().__call__(rows), "rows": list(rows)}

    def split(self, rows: Sequence[Encoded]) -> list[tuple[list[int], dict[str, Any]]]:
        """Returns row indices and a batch, of all rows."""
        return [(list(range(len(rows))), super().__call__(rows))]


def pad(rows: Sequence[list[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Returns `rows` as a tensor `(batch, longest)`, padded with `value` on the right or left."""
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
    """If EOS is the pad token of `tokenizer` (modified), set another; return a log line or None."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    vocabulary = tokenizer.get_vocab()
    tokens = (*_RESERVED, tokenizer.bos_token, *sorted(vocabulary, key=vocabulary.__getitem__)[:2])
    tokenizer.pad_token = next(t for t in tokens if t in vocabulary and t != tokenizer.eos_token)
    return Choice("pad token", tokenizer.pad_token, "EOS is read as the end of an answer")


def ensure_pad_token(tokenizer: Any) -> Choice | None:
    """Set a padding token on `tokenizer` (modified) if it has none; returns a log line or None.

    The token is one that the vocabulary reserves, so that the embedding does not grow; else EOS.
    """
    if tokenizer.pad_token_id is not None:
        return None
    usable = tokenizer.get_vocab().keys() - {tokenizer.eos_token, tokenizer.bos_token}
    reserved = next((token for token in _RESERVED if token in usable), None)
    tokenizer.pad_token = reserved or tokenizer.eos_token
    reason = "the tokenizer has none" + ("" if reserved else "; EOS labels are still supervised")
    return Choice("pad token", tokenizer.pad_token, reason)


_MASKED, _RANDOM = 0.8, 0.1
_FIXED = 0  # epoch number of the validation rows; training epochs count from 1


class MaskedRows(RowView[Encoded]):
    """Rows for masked-language modeling, masked at random on access; set `epoch` before each epoch.

    `epoch` counts from 0. `ratio` is the fraction of tokens to predict, at least one per row.
    """

    def __init__(self, rows: Sequence[Encoded], tokenizer: Any, *, ratio: float, seed: int) -> None:
        self.rows = rows
        self.ratio = ratio
        self.seed = seed
        self.epoch = 0
        self._mask = int(tokenizer.mask_token_id)
        self._special = np.array(sorted(tokenizer.all_special_ids))
        self._vocabulary = np.setdiff1d(np.arange(len(tokenizer)), self._special)

    def _item(self, at: int) -> Encoded:
        return self._draw(at, self.epoch + 1)

    def fixed(self) -> list[Encoded]:
        """Returns all rows with masks that do not depend on the epoch, for evaluation."""
        return [self._draw(index, _FIXED) for index in range(len(self))]

    def count_hidden(self) -> int:
        """Returns the number of masked (predicted) tokens per epoch."""
        return sum(
            self._count(int((~np.isin(row.input_ids, self._special)).sum())) for row in self.rows
        )

    def _count(self, candidates: int) -> int:
        return max(1, round(self.ratio * candidates))

    def _draw(self, index: int, epoch: int) -> Encoded:
        generator = np.random.default_rng((self.seed, epoch, index))
        row = self.rows[index]
        ids = np.array(row.input_ids)
        candidates = np.flatnonzero(~np.isin(ids, self._special))
        count = self._count(len(candidates))
        positions = generator.choice(candidates, count, replace=False)
        labels = np.full_like(ids, IGNORED)
        labels[positions] = ids[positions]
        draws = generator.random(count)
        tokens = generator.choice(self._vocabulary, count)
        masked, random = draws < _MASKED, draws >= 1 - _RANDOM
        ids[positions[masked]] = self._mask
        ids[positions[random]] = tokens[random]
        return replace(row, input_ids=ids.tolist(), labels=labels.tolist())


def encode_masked(
    tokenizer: Any, examples: Sequence[PlainText], length: int | None
) -> list[Encoded]:
    """Encode texts in rows of at most `length` tokens each, for `MaskedRows` to mask."""
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no mask token, which --task masked-lm "
            "hides words with. Use a model such as BERT, RoBERTa or ModernBERT."
        )
    special = set(tokenizer.all_special_ids)
    rows = []
    truncation = {"truncation": True, "max_length": length} if length else {}
    for chunk in split_batches(examples):
        encoding = tokenizer([e.text for e in chunk], return_overflowing_tokens=True, **truncation)
        for index, ids in enumerate(encoding["input_ids"]):
            if not special.issuperset(ids):
                example = chunk[encoding["overflow_to_sample_mapping"][index]]
                extras = extra_inputs(encoding, index)
                rows.append(Encoded(ids, [IGNORED] * len(ids), example.row, extras))
    return rows
