"""A fixed sample of `make torture`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from forked import Forked

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited"),
]


def run_torture(arguments: Sequence[str]) -> None:
    """Run scripts/torture.py in this process."""
    sys.argv = ["torture.py", *arguments]
    runpy.run_path(str(ROOT / "scripts/torture.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["--sample"], 5),
        (["--only", "strangers", "--share", "0.25"], 1),  # each exploit once
    ],
)
def test_torture_sample_passes(arguments: list[str], rows: int) -> None:
    process = Forked(
        call=(run_torture, ([*arguments, "--seed", "16"],)), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, error = process.communicate()
    assert process.returncode == 0, output + error
    lines = [line for line in output.splitlines() if line.startswith("| ") and " of " in line]
    assert len(lines) == 1 + rows, "the head of the table and its rows"
