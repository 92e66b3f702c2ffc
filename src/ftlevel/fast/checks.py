"""Check on short batches that a model gives the same results with the parts of the fast step.

Packed rows must not see each other: convolutions, recurrent states or custom code could leak. The
last block may skip only tokens that do not affect the loss. The chunked head must give the model's
logits, including caps and scales that are not read from known config names.
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
from ftlevel.fast.packing import PackedLayout, UnsupportedModelError, using_layout
from ftlevel.fast.prefixes import SharedPrefix, build_prefix_tree, using_prefix
from ftlevel.models.hardware import autocast, evaluating
from ftlevel.models.module_tree import linear_size
from ftlevel.task import Objective, TokenObjective

LENGTHS = 16, 12
"""Tokens of the two test rows."""

PREFIX_LENGTH = 7
"""Tokens of the test rows that form a shared prefix."""


@dataclass(frozen=True)
class PackingCheck:
    """Checks packed rows on a model with packed blocks, and restores its training mode.

    `last_block` is the block whose output is compared. The test rows are the start of the longest
    of the first 100 `rows`.
    """

    model: Any
    last_block: torch.nn.Module
    rows: Sequence[Encoded]
    pad_id: int
    device: str
    dtype: str

    def find_leak(self) -> str:
        """Return why rows cannot be packed; empty if they can."""
        first, second = shortened_pair(self.rows)
        other = replace(first, input_ids=first.input_ids[::-1])
        return self._try(lambda: self._compare_packed([first, second], [other, second]))

    def find_prefix_tree_error(self) -> str:
        """Return why a prefix tree cannot be used; empty if it can."""
        return self._try(self._compare_prefix_tree)

    def find_shared_prefix_error(self) -> str:
        """Return why a prefix cannot be computed in an earlier micro-batch; empty if it can."""
        return self._try(self._compare_shared_prefix)

    def uses_global_generator(self) -> bool:
        """Return whether a forward pass in training draws from the process's generator."""
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
        try:
            with evaluating(self.model, self.device, self.dtype):
                return compare()
        except NotImplementedError as error:
            return str(error)
        except (RuntimeError, TypeError) as error:  # e.g. of a kernel; it would end the run later
            if is_out_of_memory(error):
                raise
            return f"its packed attention does not run here ({str(error).strip().splitlines()[0]})"

    def _compare_packed(self, pair: Sequence[Encoded], beside: Sequence[Encoded]) -> str:
        batch, other = self._batch(pair), self._batch(beside)
        layout, kept = PackedLayout.from_mask(batch["attention_mask"]), batch["attention_mask"] != 0
        packed, moved = self._states(batch, layout), self._states(other, layout)
        if not _differ(moved[1][kept[1]], packed[1][kept[1]]) < self._leak():
            return "its rows see each other when they are packed"
        if not _differ(packed[kept], self._padded[kept]) < self._noise():
            return "packed rows give different values than padded ones"
        return ""

    def _compare_prefix_tree(self) -> str:
        pair = shortened_pair(self.rows)[::-1]  # the first is a prefix of the second
        batch = self._batch(pair)
        kept = batch["attention_mask"] != 0
        tree = build_prefix_tree([row.input_ids for row in pair], least=1).to(self.device)
        padded = self._padded.flip(0)
        if not _differ(self._states(batch, tree)[kept], padded[kept]) < self._noise():
            return "shared prefixes give different values than rows of their own"
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
            return "outputs change after a shared prefix of an earlier micro-batch"
        return ""

    def _leak(self) -> float:
        """Return the tolerance for a row when its neighbor changes, due to the order of sums."""
        return 1e-5 if self.dtype == "float32" else 1e-2

    @functools.cached_property
    def _padded(self) -> torch.Tensor:
        """Last-block output of the padded test rows, the reference of all comparisons."""
        return self._states(self._batch(shortened_pair(self.rows)), None)

    def _noise(self) -> float:
        return 1e-4 if self.dtype == "float32" else 1e-1

    def _batch(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = Collator(self.pad_id)(rows)
        del batch["labels"]
        return {name: value.to(self.device) for name, value in batch.items()}

    def _states(self, batch: dict[str, torch.Tensor], layout: PackedLayout | None) -> torch.Tensor:
        """Return the output of the last block (batch, seq, hidden) in float32."""
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
    """Return two prefixes of the longest row in the first 100, the longer one first."""
    branches = (branch for row in rows[:100] for branch in row.branches)
    longest = max(branches, key=lambda branch: len(branch.input_ids))
    return [_shorten(longest, length) for length in LENGTHS]


def _shorten(row: Encoded, size: int) -> Encoded:
    """Return the first `size` tokens of `row`, with the label 0."""
    extras = {name: values[:size] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:size], labels=0, extras=extras)


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of `other`."""
    return ((one - other).norm() / other.norm()).item()


FEWEST = 6
"""Minimum tokens of the test rows, so that some lie between the needed ones."""

Called = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class PruningCheck:
    """Finds the tokens and linear layers for last-layer pruning; fields as in `PackingCheck`."""

    model: Any
    last_block: nn.Module
    rows: Sequence[Encoded]
    pad_id: int
    device: str
    dtype: str

    def __call__(self, objective: Objective) -> tuple[NeededTokens | None, list[nn.Module]]:
        """Return the needed tokens, and the linear layers of the last block that may skip others.

        Both are empty if every token may be needed or torch cannot compute the gradients. No layers
        are returned if the block runs twice.
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
            """Detach the states, so that only their gradient is computed."""
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
        """Return the linear layers of the last block that may skip unneeded tokens."""
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
        """Collect the packed arguments of the last block's calls inside the `with` block."""
        calls: list[Called] = []

        def look(block: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - a hook
            without = [None if isinstance(value, Cache) else value for value in args]
            named = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
            calls.append((tuple(without), named))  # a cache would append the tokens twice

        hook = self.last_block.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()


def _outermost_linears(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers of `module`; an adapted layer counts as one."""
    if linear_size(module) is not None:
        return [module]
    return [linear for child in module.children() for linear in _outermost_linears(child)]


NOISE = {"float32": 1e-5}
"""Maximum relative difference of logits; `COARSE` below float32."""

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
    """Return why `head` cannot replace the model's own head; empty if it can."""
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
    except UnsupportedModelError as error:
        return str(error)
    finally:
        model.train(training)
    found = torch.cat(seen)
    if found.shape != expected.shape or not _head_difference(found, expected) < NOISE.get(
        dtype, COARSE
    ):
        return "its logits are changed beyond what its config describes"
    return ""


def _pair(rows: Sequence[Encoded], objective: TokenObjective) -> list[Encoded]:
    """Return the start of two rows, with every token as a target."""
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
    """Return the norm of the difference relative to the norm of `other`, in float32."""
    one, other = one.float(), other.float()
    return ((one - other).norm() / other.norm()).item()
