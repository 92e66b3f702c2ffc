"""Memory per rank as FSDP2 shards it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftlevel.config import TrainConfig
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.trained.adapt import apply_method
from ftlevel.training.forecast.memory import BlockSample, StepMemory, estimate_step_memory
from ftlevel.training.forecast.meta_model import CASTS, QUANTIZED, WEIGHTS
from ftlevel.training.forecast.shares import (
    GATHERED,
    REDUCED,
    ShardedModel,
    ShardedTensor,
    gathered_bytes,
    get_sharded_model,
)
from ftlevel.training.model import blocks_of, replicated_parameters, shard
from ftlevel.training.plan.resolve import resolve

ModelDir = Callable[..., Path]


@contextmanager
def fake_process_group(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of `ranks` with a fake process group."""
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def configure(tmp_path: Path, model: Path, method: str, dtype: str = "float32") -> TrainConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "the value of object {n}"}}\n' for n in range(8)))
    return TrainConfig.model_validate({
        "model": {"name_or_path": str(model), "dtype": dtype}, "method": {"kind": method},
        "data": {"dataset": str(rows), "cache": False}, "task": "text-generation",
        "train": {"shard": "full"},
    })  # fmt: skip


@pytest.mark.parametrize(("method", "ranks"), [("lora", 3), ("full", 1024), ("prefix", 2)])
def test_stored_bytes_match_fsdp(method, ranks, tmp_path, tiny_model_dir):
    config = configure(tmp_path, tiny_model_dir("llama", num_hidden_layers=7), method)
    run = resolve(config)
    assert BlockSample.of(run).times == {"model.layers.1": 5}
    sharded = get_sharded_model(run, ranks)
    model: Any = build_task_model(run.model.config, run.model.auto_class)
    model = apply_method(model.to_empty(device="cpu").float(), config.method, run.base)
    unsharded_ids = {id(parameter) for parameter in replicated_parameters(model)}
    size = sum(p.nbytes for p in model.parameters() if id(p) not in unsharded_ids)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with fake_process_group(ranks):
        shard(model, "cpu", keeps_unsharded=False, dtype=torch.float32)
        local_bytes = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    assert sharded.trained == trained
    assert sharded.trains_base == METHODS[method].trains_base(config.method)
    tensors = (*sharded.blocks, *sharded.root)
    assert sum(tensor.stored(1) for tensor in tensors) == size
    assert sum(tensor.stored(ranks) for tensor in tensors) == local_bytes
    assert sum(sharded.saved_bytes.values()) == size - local_bytes


def test_estimated_memory_per_rank():
    block, root = ShardedTensor(1, WEIGHTS, 8, 800, 800), ShardedTensor(1, WEIGHTS, 6, 600, 600)
    sharded = ShardedModel(4, "full", [block], [replace(block, times=10)], [root], 0, trained=40,
                           trains_base=False)  # fmt: skip
    moments = {moment: {WEIGHTS: 8610, "activations": 5} for moment in ("forward", "backward")}
    step_memory = StepMemory({}, "forward", 64, {**moments, "optimizer step": {WEIGHTS: 8610}})
    full = sharded.estimate_rank(step_memory)
    # ⌈8 / 4⌉ and ⌈6 / 4⌉ rows of each, 10 unsharded bytes; 4 · 2 gathered rows of the root
    assert full.parts == {GATHERED: 800 + 3 * 800, WEIGHTS: 10 + 10 * 200 + 200, "activations": 5}
    grads = replace(sharded, shard="grads").estimate_rank(step_memory)
    assert grads.parts[GATHERED] == 800 + 8000 + 800
    assert full.moments["optimizer step"] == {WEIGHTS: 2210, REDUCED: 40}
    assert replace(sharded, shard="none").estimate_rank(step_memory).parts[WEIGHTS] == 8610
    half = replace(block, sent=400)
    trained_base = ShardedModel(2, "full", [half], [replace(half, times=10)], [root], 300,
                                trained=8600, trains_base=True)  # fmt: skip
    states = {WEIGHTS: 8600, "gradients": 8600, "optimizer": 17200, CASTS: 4300}
    parts = trained_base.estimate_rank(StepMemory({}, "", 64, {"backward": states})).parts
    assert parts[WEIGHTS] == parts["gradients"] == 4300
    assert parts["optimizer"] == 8600
    assert parts[REDUCED] == 600 + 2 * 800
    assert parts[GATHERED] == 600 + 3 * 400  # linear layers are gathered in 16 bits
    assert parts[CASTS] == 300  # without other casts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_autocast_copies_of_sharded_model_are_only_of_head(dtype, tmp_path, tiny_model_dir):
    config = configure(tmp_path, tiny_model_dir("llama", num_hidden_layers=7), "full", dtype)
    run = resolve(config)
    model: Any = build_task_model(run.model.config, run.model.auto_class)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    sharded, step_memory = get_sharded_model(run, 2), estimate_step_memory(run, 2**30)
    cast_bytes = step_memory.moments["forward"].get(CASTS, 0)
    if dtype == "float32":
        assert cast_bytes == sharded.root_casts == 0
        return
    assert cast_bytes == 2 * sum(linear.weight.numel() for linear in linears)
    assert sharded.root_casts == 2 * model.lm_head.weight.numel()
    rank = sharded.estimate_rank(step_memory)
    assert rank.moments["forward"][CASTS] == sharded.root_casts
    blocks = list(model.model.layers.parameters())
    num_16_bit = sum(p.numel() for p in blocks if p.dim() > 1)
    size = 4 * sum(p.numel() for p in blocks)
    assert sum(tensor.stored(1) for tensor in sharded.blocks) == size
    assert gathered_bytes(sharded.blocks, 1) == size - 2 * num_16_bit


def test_quantized_codes_are_sharded_but_not_scales(tmp_path, tiny_model_dir):
    config = configure(tmp_path, tiny_model_dir("llama"), "qlora")
    run = resolve(config)
    model: Any = build_task_model(run.model.config, run.model.auto_class)
    weights = [p for block in blocks_of(model) for p in block.parameters() if p.dim() > 1]
    blocks = get_sharded_model(run, 2).blocks
    assert {tensor.part for tensor in blocks} == {QUANTIZED}
    assert sum(tensor.stored(1) for tensor in blocks) == sum(w.numel() // 2 for w in weights)
