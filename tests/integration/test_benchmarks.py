"""The benchmark of training runs, and measures the same work on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ftlevel_and_the_plain_script_do_the_same_work(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/train.py"), "--quick", "--only", "ftlevel",
         "plain", "--json", str(output)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))["workloads"][0]
    assert not result["refused"]
    ours, plain = result["tools"]["ftlevel"], result["tools"]["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    for name, value in ours.items():
        assert value > 0, name
    assert all(reading[0]["steps"] == 4 for reading in result["readings"].values())
    assert "| ftlevel |" in done.stdout
    assert "| plain |" in done.stdout
