"""A run started by Ray Train finishes after a worker was lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ftlevel.cli.app import run
from tiny_models import save_tiny

# Ray is looked for and not imported: with it in a process the last digits of others' sums differ.
HAS_RAY = importlib.util.find_spec("ray") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason="pip install 'ray[train]'")]
STEPS = 12
BOUND = 1e-6


def losses(place: Path) -> list[float]:
    rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def kill_one(name: str) -> bool:
    """End a process of the run `name` as a lost machine would; False where there is none yet."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "ftlevel" in line and name in line:
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.sweep  # Ray alone takes half a minute to start and stop
def test_a_run_by_ray_ends_as_one_process_though_a_worker_was_lost(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"say {n}", "completion": f"{n}!"} for n in range(48)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = ["--method", "lora", "--model", str(model), "--dataset", str(rows),
              "--dtype", "float32", "--max-steps", str(STEPS), "--logging-steps", "1",
              "--batch-size", "2"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    accumulated = ["--gradient-accumulation-steps", "2", "--output-dir", str(one), "--quiet"]
    assert run(["train", *common, *accumulated]) == 0
    job = tmp_path / "job.py"
    asked = ["--on", "ray", "--processes-per-node", "2", "--job-file", str(job)]
    told = ["--save-steps", "2", "--output-dir", str(two)]
    assert run(["launch", *asked, *common, *told]) == 0
    with (tmp_path / "said").open("w") as said:
        ray = subprocess.Popen(
            [sys.executable, str(job)], stdout=said, stderr=said, start_new_session=True,
            env={**os.environ, "RAY_DISABLE_DASHBOARD": "1", "RAY_TMPDIR": "/tmp"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 200
        manifest = two / "checkpoints" / "checkpoint-4" / "manifest.json"
        while not manifest.is_file() and ray.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert kill_one(str(two)), (tmp_path / "said").read_text()
        assert ray.wait(200) == 0, (tmp_path / "said").read_text()
    finally:
        if ray.poll() is None:
            os.killpg(ray.pid, signal.SIGTERM)
    wanted, found = losses(one), losses(two)
    assert len(found) == len(wanted) == STEPS
    assert max(abs(a - b) / a for a, b in zip(wanted, found, strict=True)) < BOUND
