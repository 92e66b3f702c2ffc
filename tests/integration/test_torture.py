"""A fixed sample of `make torture`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited"),
]


def test_torture_sample_passes() -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "scripts/torture.py"), "--sample", "--seed", "16"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    rows = [
        line for line in process.stdout.splitlines() if line.startswith("| ") and " of " in line
    ]
    assert len(rows) == 1 + 5, "the head of the table and its rows"
