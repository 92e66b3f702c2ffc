"""Tests of when liger-kernel is used; only its installation check is replaced."""

from __future__ import annotations

import importlib.util

import pytest

from ftlevel import TrainConfig
from ftlevel.fast.plan import LIGER_CONFIG, get_liger_arguments, kernel_choices

ON = {"liger_kernel": True}


@pytest.mark.parametrize(
    ("installed", "device", "model_type", "speed", "is_used"),
    [
        (True, "cuda", "llama", ON, True),
        (True, "cuda", "qwen3", ON, True),
        (False, "cuda", "llama", ON, False),
        (True, "cpu", "llama", ON, False),
        (True, "cuda", "bert", ON, False),
        (True, "cuda", "llama", {**ON, "fast": False}, False),
        (True, "cuda", "llama", {}, False),
    ],
)
def test_liger_is_used_only_where_supported(
    installed, device, model_type, speed, is_used, monkeypatch: pytest.MonkeyPatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (
            (object() if installed else None) if name == "liger_kernel" else find_spec(name)
        ),
    )
    section = TrainConfig.model_validate({"speed": speed}).speed
    expected = {"use_liger_kernel": True, "liger_kernel_config": LIGER_CONFIG} if is_used else {}
    assert get_liger_arguments(section, device, model_type) == expected
    assert bool(kernel_choices(section, device, model_type)) is is_used
