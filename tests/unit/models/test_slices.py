"""A base whose weights are read later is the one that is read at once."""

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

Make = Callable[..., Path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "stored", "head"),
    [
        ("llama", None, "causal"),
        ("llama", None, "qa"),  # whose class calls its base otherwise
        ("gpt2", None, "seqcls"),  # Conv1D, and a new head
        ("t5", None, "seq2seq"),  # tied, and in bfloat16 some of it stays in float32
        ("bert", "mlm", "tokcls"),
        ("bert", "seqcls", "seqcls"),  # a head of the checkpoint
    ],
)
def test_what_is_read_later_is_what_is_read_at_once(
    tiny_model_dir: Make, family: str, stored: str | None, head: str, dtype: torch.dtype
) -> None:
    source = resolve_source(str(tiny_model_dir(family, stored)))
    given = (source, load_config(source), AUTO_CLASSES[head])
    set_seed(3)
    expected, missing = load_model(*given, dtype=dtype, device="cpu")
    slices = LazyWeights()
    set_seed(3)
    model, lacks = load_model(*given, dtype=dtype, device="cpu", slices=slices)
    assert lacks == missing
    assert not slices.converted
    later = set()
    for (name, one), (also, other) in zip(
        expected.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (name, one.dtype, one.shape) == (also, other.dtype, other.shape)
        if other in slices.weights:
            later.add(name)
            assert other.isnan().all() or dtype == torch.float32  # as which it is stored
            other = slices.weights[other].whole(other.dtype)
        assert one.equal(other), name
    assert later == {name for name, p in expected.named_parameters() if p.dim() > 1} - set(missing)
    for (name, one), (also, other) in zip(
        expected.named_buffers(), model.named_buffers(), strict=True
    ):
        assert name == also
        assert one.equal(other), name
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.name_or_path == expected.name_or_path
    assert not model.can_generate() or model.generation_config == expected.generation_config


def test_what_is_put_together_of_several_tensors_is_read_at_once(tiny_model_dir: Make) -> None:
    source = resolve_source(str(tiny_model_dir("mixtral")))
    given = (source, load_config(source), AUTO_CLASSES["causal"])
    expected, _ = load_model(*given, dtype=torch.bfloat16, device="cpu")
    slices = LazyWeights()
    model, _ = load_model(*given, dtype=torch.bfloat16, device="cpu", slices=slices)
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    assert set(slices.converted) == experts
    for name in experts:
        assert model.get_parameter(name).equal(expected.get_parameter(name))
        assert model.get_parameter(name) not in slices.weights
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight") in slices.weights


def test_what_is_computed_of_a_weight_that_is_not_read_is_found(tiny_model_dir: Make) -> None:
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


def test_the_files_of_an_index_are_read_like_one(tiny_model_dir: Make, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_model_dir("llama")))
    given = (load_config(source), AUTO_CLASSES["causal"])
    whole, _ = load_model(source, *given, dtype=torch.float32, device="cpu")
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    slices = LazyWeights()
    model, missing = load_model(resolve_source(str(tmp_path)), *given, dtype=torch.bfloat16,
                                device="cpu", slices=slices)  # fmt: skip
    assert not missing
    assert slices.weights
    for name, one in whole.named_parameters():
        other = model.get_parameter(name)
        if other in slices.weights:
            other = slices.weights[other].whole(other.dtype)
        assert one.bfloat16().equal(other), name
