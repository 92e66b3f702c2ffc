"""Tests that the reported LoRA implementation is the one a run uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlevel import TrainConfig, train
from ftlevel.fast.fused_lora import FusedForward
from ftlevel.fast.plan import fused_lora_choices, uses_fused_layers

FUSED = "fused with the base (same gradients as PEFT's layers)"
INT8 = "PEFT's layers (LLM.int8() multiplies in int8 on a GPU)"


@pytest.mark.parametrize(
    ("raw", "device", "message"),
    [
        ({}, "cpu", FUSED),
        ({"quant": {"kind": "8bit"}}, "cpu", FUSED),
        ({"quant": {"kind": "8bit"}}, "cuda", INT8),
        ({"speed": {"fast": False}}, "cpu", "PEFT's layers (--no-fast)"),
        ({"speed": {"fused_lora": False}}, "cpu", "PEFT's layers (speed.fused_lora is off)"),
        ({"method": {"kind": "lora", "use_dora": True}}, "cpu",
         "PEFT's layers (DoRA scales by a norm of the whole weight)"),
        ({"method": {"kind": "ia3"}}, "cpu", None),
    ],
)  # fmt: skip
def test_lora_implementation_is_reported(raw, device, message):
    config = TrainConfig.model_validate(raw)
    sections = config.method, config.speed, config.quant.kind
    messages = [str(choice) for choice in fused_lora_choices(*sections, device)]
    assert messages == ([] if message is None else [message])
    assert uses_fused_layers(*sections, device) is (
        message is not None and message.startswith("fused")
    )


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_run_uses_reported_lora_implementation(fast, tmp_path: Path):
    config = TrainConfig.model_validate(
        {
            "data": {"max_samples": 4, "max_eval_samples": 2},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2},
            "speed": {"fast": fast},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    result = train(config)
    assert any(isinstance(m, FusedForward) for m in result.model.modules()) is fast
    choices = {line["name"]: line["value"] for line in result.summary["choices"]}
    assert choices["low-rank update"].startswith("fused" if fast else "PEFT's")
