"""Ask a model itself which tokens its last block must give, and what need not be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.checks.packing import shortened_pair
from ftlevel.fast.head.needed_tokens import NeededTokens, PooledTokens, SupervisedTokens
from ftlevel.fast.head.pruning import find_prunable_linears
from ftlevel.fast.packing.layout import PackedLayout, using_layout
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import linear_size
from ftlevel.task import Objective, TokenObjective

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
