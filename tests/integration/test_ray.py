"""A run started by Ray Train finishes after a worker was lost."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from command_line import Cli
from run_files import read_losses, write_rows
from tiny_models import save_tiny

# Ray is not imported here: importing it changes rounding in other tests of the process.
HAS_RAY = importlib.util.find_spec("ray") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason="pip install 'ray[train]'")]
STEPS = 12
TOLERANCE = 1e-6


def kill_worker(name: str) -> bool:
    """Kill a process of the run `name`; return False if there is none yet."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "ftlevel" in line and name in line:
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.sweep  # Ray alone takes half a minute to start and stop
def test_ray_run_with_killed_worker_matches_one_process(tmp_path: Path, cli: Cli) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"say {n}", "completion": f"{n}!"} for n in range(48)]
    write_rows(rows, texts)
    common = ["--method", "lora", "--model", str(model), "--dataset", str(rows),
              "--dtype", "float32", "--max-steps", str(STEPS), "--logging-steps", "1",
              "--batch-size", "2"]  # fmt: skip
    one_process, ray_run = tmp_path / "one", tmp_path / "two"
    accumulation = [
        "--gradient-accumulation-steps",
        "2",
        "--output-dir",
        str(one_process),
        "--quiet",
    ]
    cli("train", *common, *accumulation)
    job = tmp_path / "job.py"
    launch_options = ["--on", "ray", "--processes-per-node", "2", "--job-file", str(job)]
    run_options = ["--save-steps", "2", "--output-dir", str(ray_run)]
    cli("launch", *launch_options, *common, *run_options)
    with (tmp_path / "said").open("w") as log:
        ray = subprocess.Popen(
            [sys.executable, str(job)], stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "RAY_DISABLE_DASHBOARD": "1", "RAY_TMPDIR": "/tmp"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        manifest = ray_run / "checkpoints" / "checkpoint-4" / "manifest.json"
        while not manifest.is_file() and ray.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert kill_worker(str(ray_run)), (tmp_path / "said").read_text()
        assert ray.wait(200) == 0, (tmp_path / "said").read_text()
    finally:
        if ray.poll() is None:
            os.killpg(ray.pid, signal.SIGTERM)
    expected, actual = read_losses(one_process), read_losses(ray_run)
    assert len(actual) == len(expected) == STEPS
    assert max(abs(a - b) / a for a, b in zip(expected, actual, strict=True)) < TOLERANCE
