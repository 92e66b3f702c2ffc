"""Ask a model itself whether packed rows see each other: a few short batches before training.

What a family's attention does with a mask is known. What else mixes tokens (a convolution, a
recurrent state, code that came with the model) is not, and would leak from row to row in silence.

Ask a model itself which tokens its last block must give, and what need not be computed.

Ask a model itself whether its head on supervised tokens gives the scores that it would give.

What a family does to the scores of its head (a cap, a scale, a constant) is known by the names in
its config. A family that says it by another name, or whose forward pass asks the head for something
else, would be trained and scored on other numbers in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import is_out_of_memory
from ftlevel.fast.head.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.head.likelihoods import (
    NeededTokens,
    PooledTokens,
    SupervisedTokens,
    supervised_loss,
)
from ftlevel.fast.head.pruning import find_prunable_linears
from ftlevel.fast.layers.recompute import using_generator
from ftlevel.fast.packing import NotServedError, PackedLayout, using_layout
from ftlevel.fast.prefixes import SharedPrefix, build_prefix_tree, using_prefix
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import linear_size
from ftlevel.task import Objective, TokenObjective

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


FEWEST = 6
"""Tokens of the two rows that are tried, at least: some must be between those that are needed."""

Called = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class PruningCheck:
    """What it takes to ask a model.

    Attributes:
        model: with packed blocks on it; left in the mode that it is in.
        last_block: the last of them.
        rows: as of `PackingCheck`.
        pad_id: fills the batch.
        device: torch device type.
        dtype: compute precision's name.
    """

    model: Any
    last_block: nn.Module
    rows: Sequence[Encoded]
    pad_id: int
    device: str
    dtype: str

    def __call__(self, objective: Objective) -> tuple[NeededTokens | None, list[nn.Module]]:
        """Return what is needed, and the linears of the last block that may compute it alone.

        Both are empty where every token may be needed, where a block is gone through twice, and
        where torch cannot make the gradients that are asked for.
        """
        batch = Collator(self.pad_id)(shortened_pair(self.rows))
        del batch["labels"]
        batch = {name: value.to(self.device) for name, value in batch.items()}
        training = self.model.training
        self.model.eval()
        try:
            with autocast(self.device, self.dtype):
                needed = self._find_needed(objective, batch)
                return (needed, self._find_linears(batch)) if needed else (None, [])
        except RuntimeError:
            return None, []
        finally:
            self.model.train(training)

    def _find_needed(
        self, objective: Objective, batch: dict[str, torch.Tensor]
    ) -> NeededTokens | None:
        if isinstance(objective, TokenObjective):
            return SupervisedTokens(objective)
        if not objective.per_row:
            return None
        seen: list[torch.Tensor] = []

        def cut(block: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001 - a hook
            """Let the graph begin at the states, so that their gradient is all that is made."""
            states = output if isinstance(output, torch.Tensor) else output[0]
            seen.append(states.detach().requires_grad_())
            states = seen[-1].clone()
            return states if isinstance(output, torch.Tensor) else (states, *output[1:])

        hook = self.last_block.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                scores = objective.logits(self.model(**batch))
            (gradient,) = torch.autograd.grad(scores.float().square().sum(), seen[-1:])
        finally:
            hook.remove()
        is_needed = gradient.abs().amax(-1).flatten() != 0
        found = is_needed.nonzero()[:, 0]
        ends = [PooledTokens(last=False), PooledTokens(last=True)]
        return next((end for end in ends if torch.equal(end(batch), found)), None)

    def _find_linears(self, batch: dict[str, torch.Tensor]) -> list[nn.Module]:
        """Return the linears of the last block that need compute those tokens alone.

        Which tokens those are does not matter: the first and the last one of both rows are tried.
        """
        layout = PackedLayout.from_mask(batch["attention_mask"])
        if layout.tokens < FEWEST:
            return []
        needed = torch.tensor([0, layout.tokens - 1])
        layout = replace(layout, needed=needed).to(self.device)
        with self._calls() as calls, using_layout(layout), torch.no_grad():
            self.model(**batch)
        if len(calls) != 1:
            return []
        with using_layout(layout):
            return find_prunable_linears(
                self.last_block, *calls[0], layout, _outermost_linears(self.last_block)
            )

    @contextmanager
    def _calls(self) -> Iterator[list[Called]]:
        """Give a list of what the last block is called with inside the block, already packed."""
        calls: list[Called] = []

        def look(block: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - a hook
            without = [None if isinstance(value, Cache) else value for value in args]
            named = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
            calls.append((tuple(without), named))  # a cache would see the tokens twice

        hook = self.last_block.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()


def _outermost_linears(module: nn.Module) -> list[nn.Module]:
    """Return the linears of `module`, adapted ones whole."""
    if linear_size(module) is not None:
        return [module]
    return [linear for child in module.children() for linear in _outermost_linears(child)]


"""Tokens of the two rows that are tried."""

NOISE = {"float32": 1e-5}
"""How far scores may be apart, relative to their norm; below float32 it is `COARSE`."""

COARSE = 1e-2


def find_cross_entropy_error(
    head: ChunkedCrossEntropy,
    model: Any,
    objective: TokenObjective,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> str:
    """Return why `head` cannot stand for the model's own, empty if it can.

    Args:
        head: on `model`.
        model: left in the mode that it is in.
        objective: what it is trained on.
        rows: encoded rows; the beginnings of two of the first ones are tried.
        pad_id: fills the batch.
        device: torch device type.
        dtype: compute precision's name.
    """
    objective = objective.of_tokens
    batch = {k: v.to(device) for k, v in Collator(pad_id)(_pair(rows, objective)).items()}
    inputs, labels = objective.split(batch)
    seen: list[torch.Tensor] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            expected, _ = objective.targets(objective.logits(model(**inputs)), labels)
            supervised_loss(head, model, objective, batch, lambda scores, _: seen.append(scores))
    except NotServedError as error:
        return str(error)
    finally:
        model.train(training)
    found = torch.cat(seen)
    if found.shape != expected.shape or not _head_difference(found, expected) < NOISE.get(
        dtype, COARSE
    ):
        return "it does more to the scores than its config says"
    return ""


def _pair(rows: Sequence[Encoded], objective: TokenObjective) -> list[Encoded]:
    """Return the beginnings of two rows, every token of which is a target."""
    pair = []
    first = rows[0].branches[0], rows[min(1, len(rows) - 1)].branches[0]
    for row, length in zip(first, LENGTHS, strict=True):
        ids = row.input_ids[:length]
        labels = list(row.labels[:length]) if isinstance(row.labels, list | tuple) else []
        extras = {name: values[:length] for name, values in row.extras.items()}
        own = [int(label) for label in labels] if objective.feeds_labels else ids
        pair.append(replace(row, input_ids=ids, labels=own, extras=extras))
    return pair


def _head_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm."""
    one, other = one.float(), other.float()
    return ((one - other).norm() / other.norm()).item()
