"""Collate encoded rows into right-padded batches, and choose the padding token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded


class Collator:
    """Pad rows to the longest row of the batch; any valid `pad_id` works, as padding is masked."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` `(batch, seq)`, `labels` and optional tensors.

        Each branch of a row is one sequence. `labels` is `(batch,)` for one value per row,
        `(batch, n)` for n values, or `(batch, target)` padded with -100 for tokens. `verdicts` is
        `(batch, 3)`. Teacher outputs `known` (float32) and `ids` are concatenated over all targets.
        """
        verdicts = [verdict for row in rows for verdict in row.verdicts]
        taught = [row.teacher for row in rows if row.teacher is not None]
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
        "pad token", tokenizer.eos_token, "the tokenizer has none; EOS is still learned as a label"
    )
