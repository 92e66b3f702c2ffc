"""When liger-kernel is used: only the check that it is installed is pretended."""

from __future__ import annotations

import importlib.util

import pytest

from ftlevel import TrainConfig
from ftlevel.fast.plan import LIGER_CONFIG, get_liger_arguments, kernel_choices

ON = {"liger_kernel": True}


@pytest.mark.parametrize(
    ("installed", "device", "model_type", "speed", "used"),
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
def test_liger_is_chosen_where_it_is_right(
    installed, device, model_type, speed, used, monkeypatch: pytest.MonkeyPatch
):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: (
            (object() if installed else None) if name == "liger_kernel" else real(name)
        ),
    )
    section = TrainConfig.model_validate({"speed": speed}).speed
    expected = {"use_liger_kernel": True, "liger_kernel_config": LIGER_CONFIG} if used else {}
    assert get_liger_arguments(section, device, model_type) == expected
    assert bool(kernel_choices(section, device, model_type)) is used
