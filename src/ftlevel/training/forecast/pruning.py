"""Which linears of the last block will compute fewer tokens, asked of a small model of its kind.

What reaches the loss is a question about numbers, which a forecast has not: a model of one block
and few words is made with random ones, and the fast step's own check asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.config import QuantConfig, TrainConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.checks.pruning import PruningCheck
from ftlevel.fast.head.loss import base_model
from ftlevel.fast.head.needed_tokens import NeededTokens
from ftlevel.fast.packing.blocks import PackedBlocks
from ftlevel.fast.plan.fast_plan import set_packed_attention
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import find_blocks
from ftlevel.trained.adapt import apply_method
from ftlevel.training.forecast.fake_model import targets_in, with_layers
from ftlevel.training.plan.plan import Plan

MOST_PARAMETERS = 120_000_000
"""Of the small model: a block of up to 3B models. Beyond, all tokens are taken to be computed."""

_WORDS = 64


@dataclass(frozen=True)
class Pruning:
    """What the last block of a run need not compute.

    Attributes:
        needed: which tokens it must give; None for all.
        linears: names in the block of those that compute these alone.
    """

    needed: NeededTokens | None = None
    linears: Sequence[str] = ()

    def put_on(self, fast: FastStep, model: Any) -> None:
        """Have the last block of `model` compute as little (mutated)."""
        if self.linears:
            last = find_blocks(base_model(model))[-1]
            fast.prune(self.needed, [last.get_submodule(name) for name in self.linears])


def find_pruning(config: TrainConfig, plan: Plan) -> Pruning:
    """Return what the last block of the model that `plan` trains need not compute."""
    if not (plan.fast.enabled and plan.fast.packs and plan.fast.prunes_last_layer):
        return Pruning()
    last = getattr(plan.model.config.get_text_config(), "num_hidden_layers", 1) - 1
    small = _shrink(plan.model.config, last)
    model = build_task_model(small, plan.model.auto_class)
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        return Pruning()
    own = METHODS[config.method.kind]
    base = replace(
        plan, model=replace(plan.model, config=small, quant=QuantConfig())
    ).base  # a packed weight lets through what the weight lets through
    base = replace(base, targets=targets_in(model, base.targets, [last]))
    model = apply_method(
        model, own.start.default(config.method) if own.start else config.method, base
    )
    model = _with_numbers(model)
    blocks = find_blocks(base_model(model))
    if not blocks or not set_packed_attention(base_model(model)):
        return Pruning()
    packed = PackedBlocks(blocks)
    rows = [_with_few_words(row) for row in plan.data.train[:64]]
    try:
        check = PruningCheck(model, blocks[-1], rows, 0, "cpu", plan.model.dtype)
        needed, linears = check(plan.objective)
    finally:
        packed.remove()
    names = {module: name for name, module in blocks[-1].named_modules()}
    return Pruning(needed, [names[linear] for linear in linears])


def _shrink(config: Any, layer: int) -> Any:
    """Return a copy of a model's `config` with one `layer` of each stack and few words."""
    config = with_layers(config, [layer])
    for owner in (config, config.get_text_config()):
        owner.vocab_size, owner.pad_token_id = _WORDS, 0
    return config


def _with_numbers(model: Any) -> Any:
    """Return `model` on the CPU with small random weights, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    model = model.to_empty(device="cpu").float()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.5 if tensor.dim() < 2 else 0.0, 0.05, generator=generator)
        for name, tensor in model.named_buffers():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0, generator=generator)
            elif name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
            else:
                tensor.zero_()  # kinds of tokens
    return model


def _with_few_words(row: Encoded) -> Encoded:
    return replace(row, input_ids=[3 + token % (_WORDS - 3) for token in row.input_ids])
