"""The memory that `plan --task rl` estimates, next to the peak of a run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny

SMOLLM2 = Path(__file__).resolve().parents[2] / ".models" / "SmolLM2-135M-Instruct"
CELLS = [
    pytest.param("builtin:tiny-llama", ["--beta", "0.05"], id="update"),
    pytest.param("wide", ["--num-generations", "64", "--batch-size", "8"], id="sampling"),
    pytest.param("wide", ["--method", "full", "--beta", "0.05"], id="initial-weights"),
    *(
        pytest.param(str(SMOLLM2), beta, id=name, marks=pytest.mark.sweep)
        for name, beta in (("smollm2", []), ("smollm2-beta", ["--beta", "0.05"]))
    ),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary and cache are larger than its layers."""
    path = tmp_path_factory.mktemp("wide") / "model"
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 49_152}
    save_tiny(path, "llama", chat=True, **sizes)
    return path


def ftlevel(*arguments: str) -> tuple[str, int]:
    """Returns what a command prints, and the peak of its resident memory in bytes."""
    command = [sys.executable, "-m", "ftlevel", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    return told, usage.ru_maxrss * 1024


@pytest.mark.parametrize(("model", "settings"), CELLS)
def test_the_plan_is_near_the_peak(
    model: str, settings: list[str], wide: Path, tmp_path: Path
) -> None:
    if model == str(SMOLLM2) and not SMOLLM2.exists():
        pytest.skip("needs scripts/fetch_models.py smollm2")
    words = " ".join(f"parameter{i} is a number" for i in range(60))
    rows = ({"prompt": f"Describe f{i}. {words}", "answer": "x"} for i in range(16))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def vowels(completions, **_):\n"
        "    return [sum(map(text.count, 'aeiou')) / max(len(text), 1) for text in completions]\n"
    )
    reward = f"{tmp_path}/rewards.py:vowels"
    common = ["--task", "rl", "--reward", reward, "--max-steps", "1", "--check-groups", "0"]
    common += ["--model", str(wide) if model == "wide" else model, "--dtype", "float32"]
    common += ["--dataset", str(tmp_path / "rows.jsonl"), "--max-completion-length", "48"]
    common += ["--validation-split", "0.25", *settings]
    planned = json.loads(ftlevel("plan", "--json", *common)[0])
    _, measured = ftlevel("train", "--json", *common, "--output-dir", str(tmp_path / "run"))
    assert 0.88 < planned["process_bytes"] / measured < 1.2, (planned, measured)
    if "64" in settings:
        assert planned["at"] == "sampling"
    assert ("initial weights" in planned["parts"]) == ("--beta" in settings)
