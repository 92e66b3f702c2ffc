"""On a card: a run ends as on the CPU, the fast step gives the plain step's losses, 4 bits train.

Skipped without a CUDA device; `pytest tests/gpu -m gpu` runs it where there is one, and
`FTLEVEL_GPU_TESTS=cpu pytest tests/gpu -m gpu` runs the same bodies on a CPU, to try them.
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

from ftlevel.fast import kernels
from ftlevel.fast.fused_lora import FusedLoraFunction
from ftlevel.fast.kernels import ACTIVATIONS, TORCH, TritonBackend

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = os.environ.get("FTLEVEL_GPU_TESTS", "cuda")
STEPS = ("--max-steps", "4", "--logging-steps", "1", "--max-samples", "64", "--seed", "3")


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    """Train in `folder` and return the summary, with the loss of every step as `losses`."""
    command = [sys.executable, "-m", "ftlevel", "train", *STEPS, *arguments, "--json"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    log = (folder / summary["run"] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    return summary | {"losses": [record["loss"] for record in records if "loss" in record]}


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "ia3", "full"])
def test_float32_gives_the_losses_of_the_cpu(tmp_path: Path, method: str) -> None:
    common = ("--method", method, "--dtype", "float32", "--output-dir")
    card = train(tmp_path, *common, "card", "--device", DEVICE)
    cpu = train(tmp_path, *common, "cpu", "--device", "cpu")
    assert card["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert card["proof"]["reload_difference"] <= 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fast_step_gives_the_losses_of_the_plain_one(tmp_path: Path, dtype: str) -> None:
    common = ("--device", DEVICE, "--dtype", dtype, "--lora-dropout", "0", "--output-dir")
    fast = train(tmp_path, *common, "fast")
    plain = train(tmp_path, *common, "plain", "--no-fast")
    bound = 1e-4 if dtype == "float32" else 2e-2
    assert fast["losses"] == pytest.approx(plain["losses"], rel=bound)


def test_float16_learns_and_counts_what_it_skips(tmp_path: Path) -> None:
    if DEVICE == "cpu":
        pytest.skip("float16 is refused on a CPU")
    found = train(tmp_path, "--device", DEVICE, "--dtype", "float16", "--output-dir", "run")
    assert found["losses"][-1] < found["losses"][0]
    assert found["proof"]["skipped_steps"] < 4
    assert found["proof"]["adapter_effect"] > 0


@pytest.mark.parametrize("checkpointing", ["--gradient-checkpointing", "--offload-activations"])
def test_recomputed_blocks_give_the_same_losses(tmp_path: Path, checkpointing: str) -> None:
    if DEVICE == "cpu" and checkpointing == "--offload-activations":
        pytest.skip("there is nothing to offload from on a CPU")
    common = ("--device", DEVICE, "--lora-dropout", "0", "--output-dir")
    held = train(tmp_path, *common, "held", "--no-gradient-checkpointing")
    again = train(tmp_path, *common, "again", checkpointing)
    assert again["losses"] == pytest.approx(held["losses"], rel=1e-3)


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_a_quantized_base_learns_and_is_left_as_it_is(tmp_path: Path, quant: str) -> None:
    method = "qlora" if quant == "4bit" else "lora"
    found = train(tmp_path, "--method", method, "--quant", quant, "--device", DEVICE,
                  "--output-dir", "run")  # fmt: skip
    assert found["losses"][-1] < found["losses"][0]
    assert found["proof"]["frozen_tensors"] > 0
    assert found["proof"]["adapter_effect"] > 0


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    common = ("--device", DEVICE, "--save-steps", "2")
    whole = train(tmp_path, *common, "--output-dir", "whole")
    train(tmp_path, *common, "--output-dir", "broken")
    for name in ("checkpoint-4", "adapter", "summary.json"):
        place = tmp_path / "broken" / ("checkpoints/" + name if "checkpoint" in name else name)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    again = train(tmp_path, *common, "--output-dir", "broken", "--resume")
    assert again["losses"][-1] == pytest.approx(whole["losses"][-1], rel=1e-4)


def test_what_was_trained_on_a_card_merges(tmp_path: Path) -> None:
    train(tmp_path, "--device", DEVICE, "--output-dir", "run")
    command = [sys.executable, "-m", "ftlevel", "merge", "run", "--out", "merged"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_kernels_give_the_numbers_of_torchs_operations(dtype: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("kernels need a card; make test-kernels asks Triton's interpreter")
    precision = getattr(torch, dtype)
    x, gradient, gate = (torch.randn(64, 4096, device=DEVICE).to(precision) for _ in range(3))
    weight, ours = torch.randn(4096, device=DEVICE), TritonBackend()
    for w in (weight, weight.to(precision)):
        found, expected = ours.norm(x, w, 1e-6), TORCH.norm(x, w, 1e-6)
        assert all(map(kernels.are_close, expected, found))
        assert torch.equal(ours.renorm(x, w, found[1]), found[0])
        scale = expected[1]
        assert kernels.are_close(
            TORCH.norm_backward(gradient, x, w, scale), ours.norm_backward(gradient, x, w, scale)
        )
    turned = [torch.randn(2, 64, heads, 128, device=DEVICE).to(precision) for heads in (32, 8)]
    cos, sin = (torch.randn(2, 64, 128, device=DEVICE).to(precision) for _ in range(2))
    for backward in (False, True):
        pairs = zip(TORCH.rope(*turned, cos, sin, backward=backward),
                    ours.rope(*turned, cos, sin, backward=backward), strict=True)  # fmt: skip
        assert all(kernels.are_close(a, b) for a, b in pairs)
    scores, targets = 4 * gate, x.argmax(-1)
    for smoothing in (0.0, 0.1):
        (loss, of_scores), found = (way.cross_entropy(scores, targets, smoothing)
                                    for way in (TORCH, ours))  # fmt: skip
        assert kernels.are_close(loss, found[0])
        assert kernels.are_close(of_scores.to(precision), found[1])
    for kind in ACTIVATIONS:
        assert kernels.are_close(TORCH.glu(kind, gate, x), ours.glu(kind, gate, x))
        pairs = zip(TORCH.glu_backward(kind, gradient, gate, x),
                    ours.glu_backward(kind, gradient, gate, x), strict=True)  # fmt: skip
        assert all(kernels.are_close(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fused_linear_gives_the_numbers_of_float64(dtype: str) -> None:
    precision = getattr(torch, dtype)
    if DEVICE == "cpu" and dtype == "float16":
        pytest.skip("float16 is for a card")
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = functools.partial(torch.randn, device=DEVICE, dtype=torch.float64)
    parts = [draw(96, 256), draw(16, 256), draw(384, 16), draw(384), draw(384, 256) / 16]

    def compute(kind: torch.dtype) -> list[torch.Tensor]:
        x, weight = (part.to(precision).to(kind).requires_grad_() for part in (parts[0], parts[4]))
        a, b, bias = (part.to(precision).to(torch.promote_types(kind, torch.float32))
                      .requires_grad_() for part in parts[1:4])  # fmt: skip
        if kind == torch.float64:
            y = x @ weight.t() + bias + 2.0 * (x @ a.t() @ b.t())
        else:
            y = FusedLoraFunction.apply(x, None, a, b, bias, weight.detach, 2.0)
        return [y, *torch.autograd.grad(y.float().square().mean(), [x, a, b, bias])]

    for found, exact in zip(compute(precision), compute(torch.float64), strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error <= 4 * torch.finfo(precision).eps
