"""Ask a model itself whether packed rows see each other: a few short batches before training.

What a family's attention does with a mask is known. What else mixes tokens (a convolution, a
recurrent state, code that came with the model) is not, and would leak from row to row in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import is_out_of_memory
from ftlevel.fast.layers.dropout import using_generator
from ftlevel.fast.packing.layout import PackedLayout, using_layout
from ftlevel.fast.prefixes.shared_prefix import SharedPrefix, using_prefix
from ftlevel.fast.prefixes.tree import build_prefix_tree
from ftlevel.models.hardware import autocast

LENGTHS = 16, 12
"""Tokens of the two rows that are tried: enough to see each other."""

PREFIX_LENGTH = 7
"""Tokens of them that are tried as a shared prefix."""


@dataclass(frozen=True)
class PackingCheck:
    """What it takes to try a model.

    Attributes:
        model: with packed blocks on it; left in the mode that it is in.
        last_block: the last of them, whose states are compared.
        rows: encoded rows; the two that are tried are beginnings of the longest of the first ones.
        pad_id: fills the batch.
        device: torch device type.
        dtype: compute precision's name.
    """

    model: Any
    last_block: torch.nn.Module
    rows: Sequence[Encoded]
    pad_id: int
    device: str
    dtype: str

    def find_leak(self) -> str:
        """Return why rows cannot be packed, empty if they can."""
        first, second = shortened_pair(self.rows)
        other = replace(first, input_ids=first.input_ids[::-1])
        return self._try(lambda: self._compare_packed([first, second], [other, second]))

    def find_prefix_tree_error(self) -> str:
        """Return why the prefix of two rows cannot be computed once, empty if it can."""
        return self._try(self._compare_prefix_tree)

    def find_shared_prefix_error(self) -> str:
        """Return why the prefix of two rows cannot be computed in a micro-batch before theirs."""
        return self._try(self._compare_shared_prefix)

    def uses_global_generator(self) -> bool:
        """Return whether a forward pass in training takes numbers from the process's generator."""
        batch, training = self._batch(shortened_pair(self.rows)), self.model.training
        layout, before = PackedLayout.from_mask(batch["attention_mask"]), torch.get_rng_state()
        self.model.train()
        try:
            with (
                torch.no_grad(),
                using_generator(0),
                using_layout(layout),
                autocast(self.device, self.dtype),
            ):
                self.model(**batch)
            return not torch.equal(before, torch.get_rng_state())
        finally:
            torch.set_rng_state(before)
            self.model.train(training)

    def _try(self, compare: Callable[[], str]) -> str:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                return compare()
        except NotImplementedError as error:
            return str(error)
        except (RuntimeError, TypeError) as error:  # of a kernel: a run of hours would end in it
            if is_out_of_memory(error):
                raise
            return f"its packed attention does not run here ({str(error).strip().splitlines()[0]})"
        finally:
            self.model.train(training)

    def _compare_packed(self, pair: Sequence[Encoded], beside: Sequence[Encoded]) -> str:
        batch, other = self._batch(pair), self._batch(beside)
        layout, kept = PackedLayout.from_mask(batch["attention_mask"]), batch["attention_mask"] != 0
        packed, moved = self._states(batch, layout), self._states(other, layout)
        if not _differ(moved[1][kept[1]], packed[1][kept[1]]) < self._leak():
            return "its rows see each other when they are packed"
        if not _differ(packed[kept], self._padded[kept]) < self._noise():
            return "packed rows give other numbers than padded ones"
        return ""

    def _compare_prefix_tree(self) -> str:
        pair = shortened_pair(self.rows)[::-1]  # the prefix of both is the first
        batch = self._batch(pair)
        kept = batch["attention_mask"] != 0
        tree = build_prefix_tree([row.input_ids for row in pair], least=1).to(self.device)
        padded = self._padded.flip(0)
        if not _differ(self._states(batch, tree)[kept], padded[kept]) < self._noise():
            return "shared prefixes give other numbers than rows of their own"
        return ""

    def _compare_shared_prefix(self) -> str:
        pair = shortened_pair(self.rows)[::-1]
        batch, kept = self._batch(pair), self._batch(pair)["attention_mask"] != 0
        first = {name: value[:1, :PREFIX_LENGTH] for name, value in batch.items()}
        prefix = SharedPrefix(PREFIX_LENGTH)
        with using_prefix(prefix):
            self._states(first, PackedLayout.from_mask(first["attention_mask"]))
            prefix.close()
            ids = [row.input_ids for row in pair]
            states = self._states(batch, build_prefix_tree(ids, 1, PREFIX_LENGTH).to(self.device))
        kept[:, :PREFIX_LENGTH] = False
        if not _differ(states[kept], self._padded.flip(0)[kept]) < self._noise():
            return "rows give other numbers after a prefix of an earlier micro-batch"
        return ""

    def _leak(self) -> float:
        """Return how far a row may move with its neighbour: another order of sums, no more."""
        return 1e-5 if self.dtype == "float32" else 1e-2

    @functools.cached_property
    def _padded(self) -> torch.Tensor:
        """States of the pair as every model computes them, which both comparisons need."""
        return self._states(self._batch(shortened_pair(self.rows)), None)

    def _noise(self) -> float:
        return 1e-4 if self.dtype == "float32" else 1e-1

    def _batch(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = Collator(self.pad_id)(rows)
        del batch["labels"]
        return {name: value.to(self.device) for name, value in batch.items()}

    def _states(self, batch: dict[str, torch.Tensor], layout: PackedLayout | None) -> torch.Tensor:
        """Return what the last block gives (batch, seq, hidden), in float32."""
        seen: list[torch.Tensor] = []

        def look(block: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
            states = output if isinstance(output, torch.Tensor) else output[0]
            seen.append(states.float())

        hook = self.last_block.register_forward_hook(look)
        try:
            with using_layout(layout):
                self.model(**batch)
        finally:
            hook.remove()
        return seen[-1]


def shortened_pair(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the beginning of a row of `rows` and a shorter one, the longer one first."""
    branches = (branch for row in rows[:100] for branch in row.branches)
    longest = max(branches, key=lambda branch: len(branch.input_ids))
    return [_shorten(longest, length) for length in LENGTHS]


def _shorten(row: Encoded, size: int) -> Encoded:
    """Return the first `size` tokens of `row`, with one number as its label."""
    extras = {name: values[:size] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:size], labels=0, extras=extras)


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm."""
    return ((one - other).norm() / other.norm()).item()
