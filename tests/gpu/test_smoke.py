"""The README's first commands on a GPU, three steps each: half a minute, before anything longer.

Skipped without a CUDA device, as test_gpu_training.py. `python -m gpu_sim.device pytest -m gpu
tests/gpu` (with `tests` in PYTHONPATH) runs these tests on a simulated device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = os.environ.get("FTLEVEL_GPU_TESTS", "cuda")
COMMANDS = {
    "lora": "train --method lora", "qlora": "train --method qlora --quant 4bit",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_command_trains_on_gpu(name: str, tmp_path: Path) -> None:
    line = f"{COMMANDS[name]} --max-steps 3 --logging-steps 1 --device {DEVICE} --json"
    result = subprocess.run(
        [sys.executable, "-m", "ftlevel", *line.split()], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning" not in result.stderr.lower()
    summary = json.loads(result.stdout)
    assert summary["hardware"]["device"] == DEVICE
    assert summary["speed"]["fast"]
    log = (tmp_path / summary["run"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, log) if "loss" in record]
    assert losses[-1] < losses[0]
