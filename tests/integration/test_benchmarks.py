"""benchmarks/train.py: its meter, its table, and equal work on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def _micro(wall: float, tokens: int, loss: float, *, share: bool = True) -> dict[str, Any]:
    return {"kind": "micro", "began": wall - 1, "wall": wall, "cpu": wall / 2, "tokens": tokens,
            "places": 2 * tokens, "supervised": tokens // 2, "loss": loss,
            "share": share}  # fmt: skip


def _step(wall: float) -> dict[str, Any]:
    return {"kind": "step", "wall": wall, "cpu": wall / 2}


def test_what_lies_between_the_first_step_and_the_last_is_counted() -> None:
    from training.runs import read_events

    shares = [_micro(11, 100, 0.5), _micro(12, 20, 0.5), _step(12), _micro(14, 60, 2.0), _step(15)]
    looks = [(9, 20.0), (12, 60.0), (14, 50.0), (16, 70.0)]
    reading = read_events([*shares, _micro(99, 1000, 9.0)], 8.0, 300.0, looks)
    assert (reading.private_mib, reading.private_training_mib) == (70, 60)
    assert (reading.seconds, reading.cpu_seconds, reading.steps) == (3, 1.5, 2)
    assert (reading.tokens, reading.places, reading.supervised) == (60, 120, 30)
    assert (reading.all_tokens, reading.all_supervised) == (180, 90)
    assert reading.first_step_s == 2
    assert reading.loss == pytest.approx((60 * 1.0 + 30 * 2.0) / 90)
    averaged = [_micro(11, 100, 1.0, share=False), _micro(12, 20, 3.0, share=False), _step(12)]
    assert read_events([*averaged, *averaged], 8.0, 0.0, []).loss == pytest.approx(2.0)


def test_the_table_compares_with_the_best_peer_and_names_who_did_other_work() -> None:
    from training.runs import Reading
    from training.tables import best_peer, summarize, workload_table

    def reading(seconds: float, supervised: int = 50, loss: float = 2.0) -> Reading:
        return Reading(seconds, seconds, 100, 200, supervised, 2, 200, 2 * supervised, loss,
                       5.0, 1000.0, 900.0, 800.0, 2)  # fmt: skip

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
