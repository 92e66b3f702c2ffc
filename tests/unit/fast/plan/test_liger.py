"""Tests of when liger-kernel is used; only its installation check is replaced."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel import TrainConfig
from ftlevel.fast.plan import uses_liger


@pytest.mark.parametrize(
    ("changes", "is_used"),
    [
        ({}, True),
        ({"family": "qwen3"}, True),
        ({"family": "gemma3_text", "hidden_act": "gelu_pytorch_tanh"}, False),  # another head
        ({"installed": False}, False),
        ({"device": "cpu"}, False),
        ({"family": "bert"}, False),
        ({"speed": {"liger_kernel": False}}, False),
        ({"method": "adapter"}, False),  # wraps feed-forward blocks, which liger-kernel replaces
        ({"hidden_act": "gelu"}, False),  # liger-kernel would compute silu
        ({"mlp_bias": True}, False),
    ],
    ids=str,
)
def test_liger_is_used_only_where_it_computes_the_model(
    changes: dict[str, Any], is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec, installed = importlib.util.find_spec, changes.get("installed", True)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (
            (object() if installed else None) if name == "liger_kernel" else find_spec(name, *a)
        ),
    )
    config = TrainConfig.model_validate(
        {"speed": changes.get("speed", {}), "method": {"kind": changes.get("method", "lora")}}
    )
    model = SimpleNamespace(
        config=SimpleNamespace(
            model_type=changes.get("family", "llama"),
            hidden_act=changes.get("hidden_act", "silu"),
            mlp_bias=changes.get("mlp_bias", False),
        )
    )
    device = changes.get("device", "cuda")
    assert uses_liger(config.speed, config.method, model, device) is is_used
