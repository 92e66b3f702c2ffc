"""Tests of a fixed sample of the GPU simulation; `make gpu-sim` runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_sim.commands import SAMPLE
from gpu_sim.device import get_unavailable_reason

TESTS = Path(__file__).parents[1]
PATHS = (TESTS.parent / "src", TESTS, TESTS.parent / "scripts")


def run_simulation(*arguments: str, module: str = "gpu_sim") -> subprocess.CompletedProcess[str]:
    if reason := get_unavailable_reason():
        pytest.skip(reason)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "TMPDIR": os.environ["PYTEST_DEBUG_TEMPROOT"],  # where the library is cached
    }  # fmt: skip
    environment.pop("FTLEVEL_TESTS_FORKS", None)  # processes that fork have no simulated device
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_commands_run_on_simulated_gpu_as_on_cpu(tmp_path: Path) -> None:
    """They end without errors or other warnings, with equal losses and no waits in a step."""
    path = tmp_path / "results.json"
    result = run_simulation("--sample", "--jobs", "1", "--json", str(path))
    assert path.exists(), result.stderr[-3000:]
    cells = json.loads(path.read_text(encoding="utf-8"))
    assert {cell["cell"] for cell in cells} == set(SAMPLE)
    assert [cell for cell in cells if cell["problems"]] == []


@pytest.mark.slow
def test_device_computes_and_is_as_strict_as_a_card() -> None:
    checks = (sys.executable, "-m", "gpu_sim.device_checks")
    result = run_simulation(*checks, module="gpu_sim.device")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_figures_of_large_model_are_within_bounds() -> None:
    result = run_simulation("figures")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
