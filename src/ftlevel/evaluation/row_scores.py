"""Score many rows: without padding and without what nobody needs, where the model takes that.

What the fast step does for training serves here: packed rows, the last layer's pruning, and a
language head at the tokens with a label alone. The model is asked first whether it gives the
numbers of padded rows, as in training; where it does not, rows of like length are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.fast.head.loss import supervised_loss
from ftlevel.fast.packing.layout import PackedLayout, using_layout
from ftlevel.fast.plan.fast_plan import plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.task import TokenObjective
from ftlevel.trained.load import Trained

T = TypeVar("T")
Read = Callable[[Encoded, torch.Tensor], T]

WORTH_ASKING = 64
"""Rows from which on it pays to ask the model whether they may be packed."""

CPU_TOKENS, GPU_TOKENS = 1024, 16_384
"""Tokens of a forward pass."""

PADDED_TOKENS = 2_048
"""Places of a padded batch on a CPU, of a model that cannot take packed rows."""


class RowScorer:
    """Scores rows with a loaded model; `close` leaves it as it was.

    Args:
        trained: the model.
        batch_size: most rows of a forward pass; None leaves it to their tokens.
    """

    def __init__(self, trained: Trained, batch_size: int | None) -> None:
        self._trained = trained
        self._batch_size = batch_size
        self._fast: FastStep | None = None
        self._pad_id = trained.tokenizer.pad_token_id or 0
        self._collate = Collator(self._pad_id)

    def close(self) -> None:
        """Take the fast parts off the model."""
        if self._fast is not None:
            self._fast.remove()
            self._fast = None

    def __call__(self, rows: Sequence[Encoded], read: Read[T]) -> list[T]:
        """Return what `read` makes of each row and its logits, in order; call without gradients."""
        if self._fast is None and len(rows) >= WORTH_ASKING:
            self._fast = self._speed_up(rows)
        found: list[Any] = [None] * len(rows)
        for part in self._split([len(row.input_ids) for row in rows]):
            chosen = [rows[i] for i in part]
            for i, row, logits in zip(part, chosen, self._forward(chosen), strict=True):
                found[i] = read(row, logits)
        return found

    def _speed_up(self, rows: Sequence[Encoded]) -> FastStep:
        trained = self._trained
        budget = CPU_TOKENS if trained.device == "cpu" else GPU_TOKENS
        plan = plan_forward(trained.model, trained.kind, trained.method, trained.objective, budget)
        fast = FastStep(trained.model, plan)
        tried = (rows, self._pad_id, trained.device, trained.dtype)
        fast.check(*tried)
        fast.check_cross_entropy(trained.objective, *tried)
        fast.prune_last_layer(trained.objective, *tried)
        return fast

    @property
    def _packs(self) -> bool:
        return self._fast is not None and self._fast.plan.packs

    def _split(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the rows of each forward pass, the longest first."""
        on_cpu = self._trained.device == "cpu"
        most = (CPU_TOKENS if self._packs else PADDED_TOKENS) if on_cpu else GPU_TOKENS
        part: list[int] = []
        tokens = 0
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            size = lengths[row] if self._packs or not part else lengths[part[0]]
            if part and (tokens + size > most or len(part) == self._batch_size):
                yield part
                part, tokens, size = [], 0, lengths[row]
            part.append(row)
            tokens += size
        if part:
            yield part

    def _forward(self, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        """Yield the logits of each row of a forward pass."""
        trained, objective = self._trained, self._trained.objective
        batch = self._collate(rows)
        layout = None
        if self._packs and self._fast is not None:
            layout = PackedLayout.from_mask(batch["attention_mask"])
            if self._fast.plan.needed_tokens is not None:
                layout = layout.needing(self._fast.plan.needed_tokens(batch))
            layout = layout.to(trained.device)
        batch = {name: value.to(trained.device) for name, value in batch.items()}
        with using_layout(layout):
            if isinstance(objective, TokenObjective):
                yield from self._token_scores(batch, rows)
                return
            inputs, _ = objective.split(batch)
            logits = objective.logits(trained.model(**inputs))
        for row, scores in zip(rows, logits, strict=True):
            yield scores if objective.per_row else scores[: len(row.input_ids)]

    def _token_scores(
        self, batch: dict[str, torch.Tensor], rows: Sequence[Encoded]
    ) -> Iterator[torch.Tensor]:
        """Yield the scores (labelled, vocabulary) of each row's tokens that have a label."""
        objective = self._trained.objective
        seen: list[torch.Tensor] = []
        head = self._fast.cross_entropy if self._fast is not None else None
        if head is not None:
            supervised_loss(
                head, self._trained.model, objective, batch, lambda scores, _: seen.append(scores)
            )
        else:
            inputs, labels = objective.split(batch)
            seen.append(
                objective.targets(objective.logits(self._trained.model(**inputs)), labels)[0]
            )
        counts = [sum(label != IGNORED for label in _labels(row)) for row in rows]
        yield from torch.cat(seen).split(counts)  # type: ignore[no-untyped-call]


def shorten(row: Encoded, limit: int) -> Encoded:
    """Return `row` without the tokens before its last one that are beyond `limit`, as in training.

    The last token stays, which may be SEP or EOS.
    """
    if len(row.input_ids) <= limit:
        return row

    def cut(values: list[int]) -> list[int]:
        return values[: limit - 1] + values[-1:]

    extras = {name: cut(values) for name, values in row.extras.items()}
    return replace(row, input_ids=cut(row.input_ids), extras=extras)


def _labels(row: Encoded) -> list[int]:
    return row.labels if isinstance(row.labels, list) else []
