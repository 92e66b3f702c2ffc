"""Tests of when liger-kernel is used; only its installation check is replaced."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from ftlevel import TrainConfig
from ftlevel.fast.plan import uses_liger


@pytest.mark.parametrize(
    ("changes", "is_used"),
    [
        ({}, True),
        ({"model_type": "qwen3"}, True),
        ({"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh"}, False),  # another head
        ({"installed": False}, False),
        ({"device": "cpu"}, False),
        ({"model_type": "bert"}, False),
        ({"speed": {"liger_kernel": False}}, False),
        ({"method": "adapter"}, False),  # wraps feed-forward blocks, which liger-kernel replaces
        ({"hidden_act": "gelu"}, False),  # liger-kernel would compute silu
        ({"mlp_bias": True}, False),
    ],
    ids=str,
)
def test_liger_is_used_only_where_it_computes_the_model(changes, is_used, monkeypatch):
    find_spec, spec = importlib.util.find_spec, object() if changes.get("installed", True) else None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: spec if name == "liger_kernel" else find_spec(name, *a),
    )
    config = TrainConfig.model_validate(
        {"speed": changes.get("speed", {}), "method": {"kind": changes.get("method", "lora")}}
    )
    fields = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False, **changes}
    model = SimpleNamespace(config=SimpleNamespace(**fields))
    device = changes.get("device", "cuda")
    assert uses_liger(config.speed, config.method, model, device) is is_used
