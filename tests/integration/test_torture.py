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


def test_a_sample_of_the_rows_is_good() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/torture.py"), "--sample", "--seed", "16"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and " of " in line]
    assert len(rows) == 1 + 5, "the head of the table and its rows"
