"""From encoded rows to a batch of tensors: padded on the right to the longest row, no further.

Which token fills a batch for a tokenizer that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded


class Collator:
    """Pad rows into a batch.

    Args:
        pad_id: the id that fills `input_ids`; it is masked, so any id that exists will do.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` `(batch, seq)`, and `labels`.

        A batch has the branches of all rows, those of a row side by side, and `verdicts`
        `(batch, 3)` where rows have them; of what a teacher expects `known` and `ids`, one target
        after the other. Labels are `(batch,)` for a number a row, `(batch, n)`
        for n numbers a row, and `(batch, target)` filled with -100 for tokens.
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
    """Pad rows into a batch, and give them with it as `rows`, so that one that fails is named.

    What rows contrast with is a batch of its own.
    """

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return what `Collator` does, `rows`, and where there are some the `contrasts`."""
        contrasts = [other for row in rows for other in row.contrasts]
        batch: dict[str, Any] = {**super().__call__(rows), "rows": list(rows)}
        return {**batch, "contrasts": [super().__call__(contrasts)]} if contrasts else batch


def pad(rows: Sequence[list[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """Stack rows into `(batch, longest)`, filled with `value` on the right, or on the left."""
    longest = max(len(row) for row in rows)
    filled = [
        [value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


_RESERVED = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endofprompt|>",
             "<|reserved_special_token_0|>", "<|fim_pad|>", "<unk>")  # fmt: skip


def pad_apart_from_eos(tokenizer: Any) -> Choice | None:
    """Give `tokenizer` another padding token than EOS (mutated), where these are one.

    What finds the end of a row by its padding would not read an EOS there.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    vocabulary = tokenizer.get_vocab()
    known = (*_RESERVED, tokenizer.bos_token, *sorted(vocabulary, key=vocabulary.__getitem__)[:2])
    tokenizer.pad_token = next(t for t in known if t in vocabulary and t != tokenizer.eos_token)
    return Choice("pad token", tokenizer.pad_token, "EOS is read as the end of an answer")


def choose_pad_token(tokenizer: Any) -> Choice | None:
    """Give `tokenizer` a padding token (mutated) if it has none.

    A reserved or unknown token that the vocabulary already has is taken, so that no row is added
    to the embedding; EOS is the last resort. Labels are masked by position and never by id, so
    EOS stays a label even then.

    Returns:
        What was chosen, or None if the tokenizer had one.
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
