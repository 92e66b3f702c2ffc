"""benchmarks/train.py: its measurements, its table, and equal work of all tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def micro_batch_event(wall: float, tokens: int, loss: float) -> dict[str, Any]:
    return {"kind": "micro", "began": wall - 1, "wall": wall, "cpu": wall / 2, "tokens": tokens,
            "places": 2 * tokens, "supervised": tokens // 2, "loss": loss}  # fmt: skip


def step_event(wall: float) -> dict[str, Any]:
    return {"kind": "step", "wall": wall, "cpu": wall / 2}


def test_events_after_first_step_are_counted() -> None:
    from training.runs import read_events

    token_weighted = [
        micro_batch_event(11, 100, 0.5),
        micro_batch_event(12, 20, 0.5),
        step_event(12),
        micro_batch_event(14, 60, 2.0),
        step_event(15),
    ]
    reading = read_events([*token_weighted, micro_batch_event(99, 1000, 9.0)], 8.0, 300.0)
    assert reading.peak_mib == 300
    assert (reading.seconds, reading.cpu_seconds, reading.steps) == (3, 1.5, 2)
    assert (reading.tokens, reading.places, reading.supervised) == (60, 120, 30)
    assert (reading.all_tokens, reading.all_supervised) == (180, 90)
    assert reading.first_step_s == 2
    assert reading.loss == pytest.approx((60 * 1.0 + 30 * 2.0) / 90)


def test_table_compares_best_peer_and_reports_unequal_work() -> None:
    from training.runs import Reading
    from training.tables import best_peer, summarize, workload_table

    def reading(seconds: float, supervised: int = 50, loss: float = 2.0) -> Reading:
        return Reading(seconds, seconds, 100, 200, supervised, 2, 200, 2 * supervised, loss,
                       5.0, 1000.0, 2)  # fmt: skip

    readings = {"ftlevel": [reading(1)], "plain": [reading(4)], "trl": [reading(2), reading(2)],
                "cut": [reading(8, supervised=40)]}  # fmt: skip
    rows = summarize(readings, (10, 0), 1e3)
    assert best_peer(rows) == "trl"
    assert rows["ftlevel"]["mfu"] == pytest.approx(4 * 10 * 100 / 1 / 1e3)
    work = {"name": "a", "model": "m", "dtype": "d", "batch": 1, "accumulate": 1, "steps": 2,
            "tokens": 200}  # fmt: skip
    result = {"work": work, "rounds": 1, "tools": rows, "peak_flops": 1e9, "refused": {"x": "why"}}
    text = workload_table(result)
    assert "| ftlevel | 100 | 4.00 | 2.00 | 50 | 2.00 |" in text
    assert "- Best peer: trl." in text
    assert "- cut had 80 supervised ones where it has 100." in text
    assert "- x: why" in text
    assert "- trl had" not in text


@pytest.mark.sweep  # seven processes, each of which imports and trains
def test_benchmark_loss_matches_plain_script(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/train.py"), "--quick", "--only", "ftlevel",
         "plain", "--json", str(output)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text(encoding="utf-8"))["workloads"][0]
    assert not result["refused"]
    ours, plain = result["tools"]["ftlevel"], result["tools"]["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    for name, value in ours.items():
        assert value > 0, name
    assert all(reading[0]["steps"] == 4 for reading in result["readings"].values())
    assert "| ftlevel |" in process.stdout
    assert "| plain |" in process.stdout
