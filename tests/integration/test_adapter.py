"""Bottleneck adapters: complete runs, and loading with plain PEFT."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from command_line import Cli
from forked import Forked
from run_files import ModelDir

SHORT = [
    *("--model", "tiny", "--overlong", "drop", "--batch-size", "4"),
    *("--max-samples", "8", "--set", "data.max_eval_samples=4"),
    *("--max-steps", "2", "--learning-rate", "1e-3", "--set", "train.max_new_tokens=4"),
]

LOAD_PROGRAM = """
import torch, transformers
from peft import PeftConfig, PeftModel
try:
    PeftConfig.from_pretrained("run/adapter")
except KeyError as error:
    print(error)
{line}
base = transformers.AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, "run/adapter").eval()
ids = torch.arange(5, 15)[None]
with torch.no_grad(), model.disable_adapter():
    plain = model(ids).logits
with torch.no_grad():
    print((model(ids).logits - plain).abs().max().item())
"""


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_model_dir("llama", chat=True))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "method.placement=houlsby", "--gradient-checkpointing"],
        ["--set", "method.placement=pfeiffer", "--quant", "4bit"],
        ["--set", "method.placement=parallel", "--quant", "8bit", "--dtype", "float32"],
        ["--target-modules", "o_proj", "--set", "method.bottleneck_dim=4"],
        pytest.param(["--set", "method.placement=parallel"], marks=pytest.mark.sweep),
    ],
)
def test_adapter_run_passes_checks_and_generates(arguments: list[str], cli: Cli) -> None:
    command = ["train", "--method", "adapter", "--output-dir", "run", *SHORT, *arguments]
    output = cli(*command)
    summary = json.loads(Path("run/summary.json").read_text())
    assert f"{summary['trainable_parameters']:,} of" in output, "counted before, as it came out"
    proof = summary["proof"]
    assert proof["reload_difference"] == 0
    assert proof["adapter_effect"] > 0
    assert proof["idle_tensors"] == 0
    assert proof["frozen_tensors"] == 21
    assert set(
        cli.json("generate run --prompt 'def f(x):' --compare-base --json --max-new-tokens 4")[
            "answers"
        ][0]
    ) >= {"text", "base"}


def test_plain_peft_loads_adapter_after_documented_import(cli: Cli) -> None:
    cli("train --quiet --method adapter --output-dir run", *SHORT)
    card = json.loads(Path("run/adapter/ftlevel.json").read_text())
    line = f"import {card['needs_import']}"
    assert line in Path("run/adapter/README.md").read_text()
    program = LOAD_PROGRAM.format(line=line, base="tiny")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Forked(call=(exec, (program, {})), imported="libraries", **pipes)
    out, error = process.communicate()
    assert process.returncode == 0, error
    message, effect = out.split()
    assert message == "'BOTTLENECK'"
    assert float(effect) > 0


def test_reduction_factor_and_bottleneck_dim_are_mutually_exclusive(cli: Cli) -> None:
    error = cli.fails(
        "train --method adapter --set method.reduction_factor=8 --set method.bottleneck_dim=8"
    )
    assert "reduction_factor 8 and bottleneck_dim 8" in error
