"""Tests that lazily loaded weights equal eagerly loaded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from ftlevel.models.loading import load_config, load_model
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream.shards import LazyWeights
from tiny_models import AUTO_CLASSES

ModelDir = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "stored", "head"),
    [
        ("llama", None, "causal"),
        ("llama", None, "qa"),  # its class uses another base model prefix
        ("gpt2", None, "seqcls"),  # Conv1D, and a new head
        ("t5", None, "seq2seq"),  # tied; in bfloat16 some layers stay in float32
        ("bert", "mlm", "tokcls"),
        ("bert", "seqcls", "seqcls"),  # the head is in the checkpoint
    ],
)
def test_lazy_weights_equal_eager_weights(tiny_model_dir, family, stored, head, dtype):
    source = resolve_source(str(tiny_model_dir(family, stored)))
    load_args = (source, load_config(source), AUTO_CLASSES[head])
    set_seed(3)
    expected, missing = load_model(*load_args, dtype=dtype, device="cpu")
    slices = LazyWeights()
    set_seed(3)
    model, lazy_missing = load_model(*load_args, dtype=dtype, device="cpu", slices=slices)
    assert lazy_missing == missing
    assert not slices.converted
    parameters, lazy_names = dict(model.named_parameters()), set()
    assert [*parameters] == [name for name, _ in expected.named_parameters()]
    for name, eager in expected.named_parameters():
        lazy = parameters[name]
        assert (eager.dtype, eager.shape) == (lazy.dtype, lazy.shape)
        if lazy in slices.weights:
            lazy_names.add(name)
            assert lazy.isnan().all() or dtype == torch.float32  # the stored dtype
            lazy = slices.weights[lazy].whole(lazy.dtype)
        assert eager.equal(lazy), name
    matrices = {name for name, p in expected.named_parameters() if p.dim() > 1}
    assert lazy_names == matrices - set(missing)
    buffers = dict(model.named_buffers())
    assert all(eager.equal(buffers.pop(name)) for name, eager in expected.named_buffers())
    assert not buffers
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.name_or_path == expected.name_or_path
    assert not model.can_generate() or model.generation_config == expected.generation_config


def test_converted_experts_are_loaded_eagerly(tiny_model_dir):
    source = resolve_source(str(tiny_model_dir("mixtral")))
    load_args = (source, load_config(source), AUTO_CLASSES["causal"])
    expected, _ = load_model(*load_args, dtype=torch.bfloat16, device="cpu")
    slices = LazyWeights()
    model, _ = load_model(*load_args, dtype=torch.bfloat16, device="cpu", slices=slices)
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    assert set(slices.converted) == experts
    for name in experts:
        assert model.get_parameter(name).equal(expected.get_parameter(name))
        assert model.get_parameter(name) not in slices.weights
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight") in slices.weights


def test_fill_reports_buffers_computed_from_unread_weights(tiny_model_dir):
    source = resolve_source(str(tiny_model_dir("llama")))
    slices = LazyWeights()
    model, _ = load_model(source, load_config(source), AUTO_CLASSES["causal"],
                          dtype=torch.bfloat16, device="cpu", slices=slices)  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert slices.fill(model, str) == []
    layer = model.model.layers[0].mlp
    layer.register_buffer("norms", layer.up_proj.weight.detach().norm(dim=1))
    assert slices.fill(model, str) == ["model.layers.0.mlp.norms"]


def test_lazy_weights_of_sharded_checkpoint(tiny_model_dir, tmp_path):
    source = resolve_source(str(tiny_model_dir("llama")))
    load_args = (load_config(source), AUTO_CLASSES["causal"])
    expected, _ = load_model(source, *load_args, dtype=torch.float32, device="cpu")
    expected.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    slices = LazyWeights()
    model, missing = load_model(resolve_source(str(tmp_path)), *load_args, dtype=torch.bfloat16,
                                device="cpu", slices=slices)  # fmt: skip
    assert not missing
    assert slices.weights
    for name, eager in expected.named_parameters():
        lazy = model.get_parameter(name)
        if lazy in slices.weights:
            lazy = slices.weights[lazy].whole(lazy.dtype)
        assert eager.bfloat16().equal(lazy), name
