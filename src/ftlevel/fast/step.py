"""Apply the fast step to a model, after checks that the model supports each part.

Every part gives the results of the plain step. Unsupported parts are left out, with a reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ftlevel.data.encoding.row import Encoded
from ftlevel.fast import packed_attention as attention
from ftlevel.fast.checks import PackingCheck, PruningCheck, get_cross_entropy_error
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.fused_layers import FusedNormGlu
from ftlevel.fast.likelihoods import TokenSelector, base_model
from ftlevel.fast.packing import PackedModel
from ftlevel.fast.parallel_workers import ParallelWorkers
from ftlevel.fast.plan import FastPlan, has_language_head, set_packed_attention
from ftlevel.fast.pruning import LastLayerPruning
from ftlevel.fast.recompute import PerWorkerDropout
from ftlevel.models.module_tree import get_blocks
from ftlevel.models.upstream.architectures import attention_of
from ftlevel.objectives import Objective


class FastStep:
    """The parts of a plan, applied to a model (modified until `remove`).

    `plan` is updated to the parts in use; `cross_entropy`, `workers` and `norm_glu` are None if
    unused. `pruned_linears` is the number of linear layers of the last block that skip tokens.
    """

    def __init__(self, model: Any, plan: FastPlan) -> None:
        self.plan = plan
        self._model = model
        self._base = base_model(model)
        self._packing: PackedModel | None = None
        self._attention_before = attention_of(self._base)
        if plan.packs:
            if not set_packed_attention(self._base):
                raise TypeError(f"{type(self._base).__name__} did not accept {attention.NAME}")
            self._packing = PackedModel(self._base)
        elif plan.enabled and next(self._base.parameters()).is_cuda:
            set_packed_attention(self._base)  # its masks of padded rows need no synchronization
        self.cross_entropy = ChunkedCrossEntropy(self._base) if plan.chunked_cross_entropy else None
        self.norm_glu = FusedNormGlu(model) if plan.fused_norm_glu else None
        self.workers: ParallelWorkers | None = None
        self.pruned_linears = 0
        self._pruning: LastLayerPruning | None = None
        self._dropout = PerWorkerDropout(model)
        if plan.workers > 1:
            self.workers = ParallelWorkers(plan.workers, torch.get_num_threads(), plan.is_random)

    def check(self, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str) -> list[str]:
        """Disable the parts that fail a check of `PackingCheck` on `rows`; returns the reasons."""
        if self._packing is None:
            return []
        check = PackingCheck(self._model, get_blocks(self._base)[-1], rows, pad_id, device, dtype)
        messages = []
        if packing_error := check.get_packing_error():
            self.plan = replace(self.plan, packs=False, prefix_tree=False, shared_prefix=False)
            self._remove_packing()
            messages.append(f"rows are padded: {packing_error}")
        elif self.plan.prefix_tree and (message := check.get_prefix_tree_error()):
            self.plan = replace(self.plan, prefix_tree=False, shared_prefix=False)
            messages.append(f"prefixes are not shared: {message}")
        elif self.plan.shared_prefix and (message := check.get_shared_prefix_error()):
            self.plan = replace(self.plan, shared_prefix=False)
            messages.append(f"micro-batches do not share their prefix: {message}")
        is_random = self.workers is not None and self.workers.is_random
        if is_random and (packing_error or check.uses_global_generator()):
            self._close_workers()
            self.plan = replace(self.plan, workers=1, is_random=False)
            messages.append(
                "micro-batches are computed one at a time: it draws at random, in order"
            )
        return messages

    def _close_workers(self) -> None:
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def check_cross_entropy(
        self, objective: Objective, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str
    ) -> str:
        """Disable chunked cross-entropy if its check fails; returns the error, empty for none."""
        if self.cross_entropy is None:
            return ""
        message = get_cross_entropy_error(
            self.cross_entropy, self._model, objective, rows, pad_id, device, dtype
        )
        if not message:
            return ""
        self.plan = replace(self.plan, chunked_cross_entropy=False, shared_prefix=False)
        self.cross_entropy.remove()
        self.cross_entropy = None
        return f"its head is computed on every token: {message}"

    def prune_last_layer(
        self, objective: Objective, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str
    ) -> None:
        """Where possible, make the last block compute only the tokens that the loss needs."""
        if self._packing is None or not self.plan.prunes_last_layer:
            return
        last = get_blocks(self._base)[-1]
        select, linears = PruningCheck(self._model, last, rows, pad_id, device, dtype)(objective)
        self.prune(select, linears)

    def prune(self, select: TokenSelector | None, linears: Sequence[nn.Module]) -> None:
        """Make the last block's `linears`, if any, compute only tokens that `select` returns."""
        if linears:
            self.plan = replace(self.plan, needed_tokens=select)
            self._pruning, self.pruned_linears = LastLayerPruning(linears), len(linears)

    def _remove_packing(self) -> None:
        if self._packing is not None:
            self._packing.remove()
            self._packing = None
        self._base.set_attn_implementation(self._attention_before)

    def remove(self) -> None:
        """Remove all parts of the fast step, so that the model runs as before."""
        for part in (self.cross_entropy, self.norm_glu, self._pruning, self._dropout):
            if part is not None:
                part.remove()
        self._close_workers()
        self._remove_packing()


@contextlib.contextmanager
def chunked_cross_entropy(
    model: Any,
    objective: Objective | None,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> Iterator[ChunkedCrossEntropy | None]:
    """Yields the chunked cross-entropy of `model`; None if it has no head or the check fails."""
    base = base_model(model)
    head = ChunkedCrossEntropy(base) if has_language_head(base, objective) else None
    try:
        if head is not None and get_cross_entropy_error(
            head, model, objective, rows, pad_id, device, dtype
        ):
            head.remove()
            head = None
        yield head
    finally:
        if head is not None:
            head.remove()
