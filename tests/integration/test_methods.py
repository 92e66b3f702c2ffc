"""Methods with additional state: interrupted and resumed runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir

SHORT = [
    *("--max-samples", "16", "--set", "data.max_eval_samples=8", "--batch-size", "4"),
    *("--max-steps", "4", "--save-steps", "1", "--dtype", "float32", "--overlong", "drop"),
]


def train(*arguments: str) -> dict[str, Any]:
    assert run(["train", "--quiet", *arguments]) == 0
    out = Path(arguments[arguments.index("--output-dir") + 1])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def digest(folder: Path) -> str:
    data = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return hashlib.sha256(data + (folder / "adapter/adapter_config.json").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "adalora", "--set", "method.init_r=4", "--set", "method.target_r=2"],
        ["--init", "pissa"],
        ["--init", "pissa_niter_4", "--dora"],
        ["--init", "eva"],
        ["--init", "loftq", "--quant", "4bit"],
        ["--lora-plus-ratio", "16", "--rslora"],
    ],
    ids=lambda flags: flags[1],
)
def test_resumed_run_matches_uninterrupted_run(
    flags: list[str], tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    model = str(tiny_model_dir("llama", chat=True))
    data = ("--dataset", str(task_data.write(tmp_path / "data", "mask")))
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    summary = train("--model", model, *data, *SHORT, *flags, "--output-dir", str(uninterrupted))
    assert summary["proof"]["adapter_effect"] > 0
    assert summary["proof"]["idle_tensors"] == 0
    shutil.copytree(uninterrupted, interrupted)
    for checkpoint in (interrupted / "checkpoints").glob("checkpoint-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
        assert set(manifest["files"]) == files  # nothing was written after the manifest
    shutil.rmtree(interrupted / "adapter")
    shutil.rmtree(interrupted / "checkpoints/checkpoint-4")
    cli(f"train --quiet --output-dir {interrupted} --resume")
    assert digest(interrupted) == digest(uninterrupted)


def test_pissa_requires_float32(cli: Cli, tmp_path: Path) -> None:
    flags = ["--init", "pissa", "--dtype", "bfloat16", "--output-dir", str(tmp_path / "run")]
    error = cli.fails("train --quiet", *flags)
    assert error == (
        "ftlevel: --init pissa cannot be used with --dtype bfloat16: it subtracts its "
        "initialization from the base's weights; rounding the rest would change the trained model. "
        "Use --dtype float32, or --init default.  [methods]\n"
    )


def test_unsupported_method_is_rejected_before_loading(
    cli: Cli, tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    model = tiny_model_dir("gpt2")
    flags = ["--model", str(model), "--method", "oft", "--output-dir", str(tmp_path / "run")]
    error = cli.fails("train --quiet", *flags)
    assert error.startswith("ftlevel: --method oft cannot be used with gpt2: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["oft", "boft", "miss", "shira", "c3a"])
def test_advice_to_quantize_gpt2_is_right(
    method: str, tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    """Quantization replaces Conv1D by linear layers, which these methods support."""
    arguments = ["--model", str(tiny_model_dir("gpt2")), "--method", method]
    data = ["--dataset", str(task_data.write(tmp_path / "data", "mask"))]
    out = ["--quant", "4bit", "--output-dir", str(tmp_path / "run")]
    summary = train(*arguments, *data, *SHORT, *out)
    assert summary["proof"]["adapter_effect"] > 0
