"""A fixed sample of `make torture`: every row a little, with a seed of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "kill": "0.01", "late": "0.02", "signals": "0.03", "damage": "0.02", "state": "0.05",
    "cache": "0.02", "disk": "0.04", "changed": "0.1", "numbers": "0.1", "memory": "0.1",
    "hostile": "0.02", "overwrite": "0.1", "secrets": "0.2", "fuzz": "0.001",
}  # fmt: skip
"""Row → share of its count; faults of two processes are in test_processes.py."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited"),
]


@pytest.mark.parametrize("row", ROWS)
def test_a_sample_of_a_row_is_good(row: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/torture.py"), "--only", row, "--share", ROWS[row],
         "--seed", "16"], capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " of " in done.stdout.splitlines()[-3], "the table has the row"
