"""Tests of a fixed sample of the GPU simulation; `make gpu-sim` runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_sim.__main__ import SAMPLE
from gpu_sim.card import get_unavailable_reason

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Return the results of a separate process; the simulated GPU must exist before torch loads."""
    if reason := get_unavailable_reason():
        pytest.skip(reason)
    paths = (TESTS.parent / "src", TESTS, TESTS.parent / "scripts", os.environ.get("PYTHONPATH"))
    result = subprocess.run(
        [sys.executable, "-m", "gpu_sim", "--sample", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if p),
             "TMPDIR": os.environ["PYTEST_DEBUG_TEMPROOT"]},  # where the library is cached
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout, result.stderr[-3000:]
    output: dict[str, Any] = json.loads(result.stdout)
    return output


@pytest.mark.slow
def test_all_tensors_of_a_step_are_on_the_gpu(figures: dict[str, Any]) -> None:
    assert figures["cells"] == len(SAMPLE)
    assert figures["failures"] == {}


@pytest.mark.slow
def test_step_never_waits_for_the_gpu(figures: dict[str, Any]) -> None:
    assert figures["waits"] == {}


@pytest.mark.slow
def test_all_figures_are_within_bounds(figures: dict[str, Any]) -> None:
    failed = [row for row in figures["rows"] if not row["is_met"]]
    assert not failed


@pytest.mark.slow
def test_simulation_detects_known_errors(figures: dict[str, Any]) -> None:
    assert figures["unseen"] == []
