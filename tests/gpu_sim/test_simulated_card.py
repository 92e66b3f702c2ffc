"""A fixed sample of the simulation, within its bounds; `make gpu-sim` has the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_sim.__main__ import SAMPLE
from gpu_sim.card import why_not

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Return what a process of its own finds: the card must be there before torch is."""
    if reason := why_not():
        pytest.skip(reason)
    places = (TESTS.parent / "src", TESTS, TESTS.parent / "scripts", os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-m", "gpu_sim", "--sample", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in places if p)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_every_tensor_of_a_step_is_on_the_card(figures: dict[str, Any]) -> None:
    assert figures["cells"] == len(SAMPLE)
    assert figures["failures"] == {}


@pytest.mark.slow
def test_a_step_waits_for_nothing(figures: dict[str, Any]) -> None:
    assert figures["waits"] == {}


@pytest.mark.slow
def test_every_figure_keeps_its_bound(figures: dict[str, Any]) -> None:
    beyond = [row for row in figures["rows"] if not row["is_met"]]
    assert not beyond


@pytest.mark.slow
def test_the_simulation_sees_the_faults_that_it_is_for(figures: dict[str, Any]) -> None:
    assert figures["unseen"] == []
