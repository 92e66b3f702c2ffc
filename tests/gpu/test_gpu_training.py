"""Tests on a GPU: losses as on the CPU, fast step as plain step, 4-bit training.

Skipped without a CUDA device. `pytest tests/gpu -m gpu` runs them;
`FTLEVEL_GPU_TESTS=cpu pytest tests/gpu -m gpu` runs the same bodies on a CPU.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlevel.fast.fused_lora import FusedLoraFunction

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = os.environ.get("FTLEVEL_GPU_TESTS", "cuda")
STEPS = ("--max-steps", "4", "--logging-steps", "1", "--max-samples", "64", "--seed", "3")


def train(directory: Path, *arguments: str) -> dict[str, Any]:
    """Train in `directory` and return the summary, with the loss of every step as `losses`."""
    command = [sys.executable, "-m", "ftlevel", "train", *STEPS, *arguments, "--json"]
    result = subprocess.run(
        command, cwd=directory, env=os.environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    log = (directory / summary["run"] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    return summary | {"losses": [record["loss"] for record in records if "loss" in record]}


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "ia3", "full"])
def test_float32_losses_match_cpu(tmp_path: Path, method: str) -> None:
    common = ("--method", method, "--dtype", "float32", "--output-dir")
    gpu = train(tmp_path, *common, "card", "--device", DEVICE)
    cpu = train(tmp_path, *common, "cpu", "--device", "cpu")
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert gpu["proof"]["reload_difference"] <= 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fast_step_losses_match_plain_step(tmp_path: Path, dtype: str) -> None:
    common = ("--device", DEVICE, "--dtype", dtype, "--lora-dropout", "0", "--output-dir")
    fast = train(tmp_path, *common, "fast")
    plain = train(tmp_path, *common, "plain", "--no-fast")
    bound = 1e-4 if dtype == "float32" else 2e-2
    assert fast["losses"] == pytest.approx(plain["losses"], rel=bound)


def test_float16_training_learns_and_counts_skipped_steps(tmp_path: Path) -> None:
    if DEVICE == "cpu":
        pytest.skip("float16 is refused on a CPU")
    summary = train(tmp_path, "--device", DEVICE, "--dtype", "float16", "--output-dir", "run")
    assert summary["losses"][-1] < summary["losses"][0]
    assert summary["proof"]["skipped_steps"] < 4
    assert summary["proof"]["adapter_effect"] > 0


@pytest.mark.parametrize("checkpointing", ["--gradient-checkpointing", "--offload-activations"])
def test_checkpointing_gives_same_losses(tmp_path: Path, checkpointing: str) -> None:
    if DEVICE == "cpu" and checkpointing == "--offload-activations":
        pytest.skip("there is nothing to offload from on a CPU")
    common = ("--device", DEVICE, "--lora-dropout", "0", "--output-dir")
    plain = train(tmp_path, *common, "held", "--no-gradient-checkpointing")
    recomputed = train(tmp_path, *common, "again", checkpointing)
    assert recomputed["losses"] == pytest.approx(plain["losses"], rel=1e-3)


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_training_on_quantized_base_learns_and_keeps_base(tmp_path: Path, quant: str) -> None:
    method = "qlora" if quant == "4bit" else "lora"
    summary = train(tmp_path, "--method", method, "--quant", quant, "--device", DEVICE,
                  "--output-dir", "run")  # fmt: skip
    assert summary["losses"][-1] < summary["losses"][0]
    assert summary["proof"]["frozen_tensors"] > 0
    assert summary["proof"]["adapter_effect"] > 0


def test_resume_after_interrupt_matches_uninterrupted_run(tmp_path: Path) -> None:
    common = ("--device", DEVICE, "--save-steps", "2")
    uninterrupted = train(tmp_path, *common, "--output-dir", "whole")
    train(tmp_path, *common, "--output-dir", "broken")
    for name in ("checkpoint-4", "adapter", "summary.json"):
        path = tmp_path / "broken" / ("checkpoints/" + name if "checkpoint" in name else name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(tmp_path, *common, "--output-dir", "broken", "--resume")
    assert resumed["losses"][-1] == pytest.approx(uninterrupted["losses"][-1], rel=1e-4)


def test_adapter_trained_on_gpu_merges(tmp_path: Path) -> None:
    train(tmp_path, "--device", DEVICE, "--output-dir", "run")
    command = [sys.executable, "-m", "ftlevel", "merge", "run", "--out", "merged"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_linear_matches_float64(dtype: str) -> None:
    precision = getattr(torch, dtype)
    if DEVICE == "cpu" and dtype == "float16":
        pytest.skip("float16 is for a card")
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = functools.partial(torch.randn, device=DEVICE, dtype=torch.float64)
    tensors = [draw(96, 256), draw(16, 256), draw(384, 16), draw(384), draw(384, 256) / 16]

    def compute(kind: torch.dtype) -> list[torch.Tensor]:
        x, weight = (
            tensor.to(precision).to(kind).requires_grad_() for tensor in (tensors[0], tensors[4])
        )
        a, b, bias = (tensor.to(precision).to(torch.promote_types(kind, torch.float32))
                      .requires_grad_() for tensor in tensors[1:4])  # fmt: skip
        if kind == torch.float64:
            y = x @ weight.t() + bias + 2.0 * (x @ a.t() @ b.t())
        else:
            y = FusedLoraFunction.apply(x, None, a, b, bias, weight.detach, 2.0)
        return [y, *torch.autograd.grad(y.float().square().mean(), [x, a, b, bias])]

    for actual, exact in zip(compute(precision), compute(torch.float64), strict=True):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error <= 4 * torch.finfo(precision).eps
