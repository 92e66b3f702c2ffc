"""Fake model built from a config alone, synthetic rows, and tracking of live tensor bytes.

    live(t) = Σ bytes of the storages referenced at t, each counted once;  peak = max over t

Workspace that a kernel allocates and frees internally is not counted.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ftlevel.fast.checks import get_linear_layers
from ftlevel.fast.likelihoods import PooledTokens, SupervisedTokens, TokenSelector, base_model
from ftlevel.fast.plan import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import build_task_model, keep_heads
from ftlevel.models.module_tree import ModuleTree, get_blocks
from ftlevel.models.quantization import build_quantization_config, packs_experts
from ftlevel.models.upstream.architectures import can_pack
from ftlevel.models.upstream.fake import (
    OperationWatch,
    fake_parameters,
    fill_vectors,
    pack_fake,
    storage_of,
)
from ftlevel.models.upstream.quantizers import quantize_shape
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.run import Run

if TYPE_CHECKING:
    from ftlevel.objectives import TokenObjective


@dataclass(frozen=True)
class FakeModel:
    """Model of fake tensors, its fast step, and all tensors of its quantized weights."""

    model: Any
    fast: FastStep | None
    quantized: list[Tensor]

    def close(self) -> None:
        """Remove the fast step, which replaces functions in modules of transformers."""
        if self.fast is not None:
            self.fast.remove()


def create_fake_model(run: Run, blocks: Collection[str]) -> FakeModel:
    """Returns the run's model on fake CPU tensors, with only the `blocks` of these names."""
    model_info, method = run.model, METHODS[run.config.method.kind]
    dtype = DTYPES[model_info.dtype]
    # The fast step sets the attention in the config.
    meta: Any = build_task_model(copy.deepcopy(model_info.config), model_info.auto_class)
    tree = ModuleTree(meta)
    for stack in tree.blocks:
        for name, _ in list(tree.modules[stack].named_children()):
            if f"{stack}.{name}" not in blocks:
                delattr(tree.modules[stack], name)
    meta.to(dtype if method.is_adapter else DTYPES["float32"])
    meta.tie_weights()
    quantization = build_quantization_config(model_info.quant, dtype, model_info.heads)
    if quantization is not None:
        args = model_info.config, model_info.auto_class, model_info.source
        quantization = keep_heads(quantization, *args)
        quantize_shape(meta, quantization)
    modules = dict(meta.named_modules())
    base = replace(run.base, targets=[name for name in run.base.targets if name in modules])
    spec = method.initialization.without_weights(run.config.method)
    fused = uses_fused_layers(
        run.config.method, run.config.speed, model_info.quant.kind, model_info.device
    )
    model = apply_method(meta, spec, base, fused=fused)
    fill_vectors(model)
    # One worker is simulated; the others allocate the same.
    fast = FastStep(model, replace(run.fast, workers=1)) if run.fast.enabled else None
    if fast is not None and (select := select_needed_tokens(run)):
        last = get_blocks(base_model(model))[-1]
        names = {module: name for name, module in last.named_modules()}
        fast.prune(select, [m for m in get_linear_layers(last) if not _ATTENDED.search(names[m])])
    quantized: list[Tensor] = []
    if quantization is not None:
        quantized = pack_fake(model, dtype, quantization if packs_experts(quantization) else None)
    for module in filter(can_pack, model.modules()):
        if any(weight.dtype == torch.float32 for weight in module.parameters()):
            from ftlevel.models.upstream.experts import assume_even_experts

            assume_even_experts(module.config)
    fake_parameters(model)
    model.to = lambda *_, **__: model  # fake tensors cannot be moved
    return FakeModel(model, fast, quantized)


_ATTENDED = re.compile(r"key|value|kv|c_attn|\b[kv]_(proj|lin)$")
"""Names of linear layers that compute keys and values, which the last block needs of all tokens."""


def select_needed_tokens(run: Run) -> TokenSelector | None:
    """Returns the selector of the tokens that the last block of `run` computes; None for all."""
    objective, fast = run.objective, run.fast
    is_pruned = fast.enabled and fast.packs and fast.prunes_last_layer
    if is_pruned and objective.predicts_tokens:
        return SupervisedTokens(cast("TokenObjective", objective))
    is_last = run.model.kind == "decoder"
    return PooledTokens(is_last, run.model.pad_id) if is_pruned and objective.per_row else None


ACTIVATIONS, WORKSPACE, LOGITS = "activations", "workspace", "logits"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
WEIGHTS, QUANTIZED, ADAPTER = "weights", "quantized weights", "adapter"
CASTS = "weights in 16 bits"
"""16-bit copies of trained weights that autocast keeps for the backward pass."""

TEMPORARY_PARTS = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS)
"""Parts that a step allocates and frees; each parallel worker has its own."""
PERSISTENT_PARTS = (WEIGHTS, QUANTIZED, ADAPTER, OPTIMIZER)
"""Parts that stay between steps."""

FORWARD, BACKWARD, FIRST_BLOCK, UPDATE = "forward", "backward", "end of backward", "optimizer step"

_PART_BY_PHASE = {FORWARD: ACTIVATIONS, UPDATE: OPTIMIZER}


class LiveMemoryTracker(OperationWatch):  # type: ignore[no-untyped-call]  # torch's
    """Context manager that counts the bytes of live tensors by category.

    The phase `moment` sets the category of new tensors: activations in FORWARD, optimizer in
    UPDATE, else workspace. Before UPDATE, float tensors `(…, vocab_size)` are logits. `peaks` maps
    each phase to bytes by category at its peak, and is updated only while `is_counting`.
    """

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.moment = FORWARD
        self.peaks: dict[str, Counter[str]] = {}
        self.is_counting = True
        self._vocab_size = vocab_size
        # Lists of one: the finalizer reads the part after the storage is freed.
        self._parts: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._max_total: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes of all tensors that are live now."""
        return self._total

    def has_tensor(self, tensor: Tensor) -> bool:
        """Returns whether the storage of `tensor` is counted."""
        return storage_of(tensor) in self._parts

    def add(self, tensor: Tensor, part: str) -> None:
        """Count the storage of `tensor` in category `part`, and no longer in its former one."""
        storage = storage_of(tensor)
        size, category = storage.nbytes(), self._parts.get(storage)
        if category is None:
            category = self._parts[storage] = [part]
            weakref.finalize(storage, self._remove, category, size)
        else:
            self._remove(category, size)
            category[0] = part
        self._alive[part] += size
        self._total += size
        self._update_peak()

    def _remove(self, category: list[str], size: int) -> None:
        self._alive[category[0]] -= size
        self._total -= size

    def _update_peak(self) -> None:
        if self.is_counting and self._total > self._max_total[self.moment]:
            self._max_total[self.moment] = self._total
            self.peaks[self.moment] = Counter({k: v for k, v in self._alive.items() if v})

    def on_result(self, tensor: Tensor) -> None:
        """Count the storage of an operation's result, unless it is counted already."""
        if not self.has_tensor(tensor):
            self.add(tensor, self._get_part(tensor))

    def on_cast(self, tensor: Tensor, result: Tensor) -> None:
        """Count `result`, which is `tensor` in another dtype, as CASTS if `tensor` is a weight."""
        if self._parts.get(storage_of(tensor)) == [WEIGHTS] and not self.has_tensor(result):
            self.add(result, CASTS)

    def _get_part(self, tensor: Tensor) -> str:
        is_scores = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        if is_scores and tensor.is_floating_point() and self.moment != UPDATE:
            return LOGITS
        return _PART_BY_PHASE.get(self.moment, WORKSPACE)
