"""The kit for a GPU machine: resumable, and minimal.

All of it runs on a CPU, in minutes: `make gpu-kit`, and then each of its lines with `--tiny`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks/gpu/run.py"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from gpu import measure

    monkeypatch.setattr(measure, "measure_peak", lambda work: 1e9)
    return measure.Measurements(tmp_path / "out/lora.json", None)


def work(folder: Path, shape: str = "2k") -> Any:
    from gpu.model import write_llama
    from gpu.rows import build

    write_llama(folder / "tiny", "cpu", tiny=True)
    return build(shape, "none", folder / "tiny", folder / shape, tiny=True)


def reading() -> Any:
    from training.runs import Reading

    return Reading(2.0, 1.0, 100, 100, 50, 3, 150, 75, 2.0, 5.0, 1000.0, 900.0, 800.0, 1)


def test_what_was_measured_is_not_measured_again(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.runs import FailedRunError

    from gpu import measure

    made, ran = work(tmp_path), []
    kept.path.parent.mkdir()

    def run(tool: Any, *_: Any) -> Any:
        ran.append(tool.name)
        if tool.name == "plain":
            raise FailedRunError("out of memory")
        return reading()

    monkeypatch.setattr(measure, "measure_tool", run)
    assert not measure.measure_shape("2k", made, kept, tmp_path, time.time())  # no time at all
    assert not ran
    assert measure.measure_shape("2k", made, kept, tmp_path, time.time() + 60)
    assert ran == [tool.name for tool in measure.TOOLS]
    again = measure.Measurements(kept.path, None)
    assert measure.measure_shape("2k", made, again, tmp_path, time.time() + 60)
    carried = measure.Measurements(tmp_path / "elsewhere/lora.json", kept.path.parent)
    assert measure.measure_shape("2k", made, carried, tmp_path, time.time() + 60)
    assert len(ran) == len(measure.TOOLS)
    table = kept.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| ftlevel | 50 |" in table
    assert "- plain: out of memory" in table


def test_a_run_that_the_clock_ended_is_no_result(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.runs import FailedRunError

    from gpu import measure

    def run(*_: Any) -> Any:
        time.sleep(0.3)
        raise FailedRunError("ended with -9")

    monkeypatch.setattr(measure, "measure_tool", run)
    made = work(tmp_path)
    until = time.time() + measure.SPARE_SECONDS + 0.2
    assert not measure.measure_shape("2k", made, kept, tmp_path, until)
    assert kept.found["shapes"]["2k"]["refused"] == {}


def test_nothing_begins_when_the_time_is_over_and_the_peak_is_measured_once(
    kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import measure

    peaks: list[Any] = []
    monkeypatch.setattr(measure, "measure_peak", lambda work: peaks.append(work) or 1e9)
    monkeypatch.setattr(measure, "measure_tool", lambda *_: reading())
    made = {shape: work(tmp_path, shape) for shape in ("2k", "prefix")}
    kept.path.parent.mkdir()
    for shape, its_work in made.items():
        assert not measure.measure_shape(shape, its_work, kept, tmp_path, time.time())
    assert kept.found["shapes"] == {}
    assert not peaks
    for shape, its_work in made.items():
        assert measure.measure_shape(shape, its_work, kept, tmp_path, time.time() + 60)
    assert len(peaks) == 1


def test_rows_are_of_their_shape(tmp_path: Path) -> None:
    from gpu.rows import TINY_LENGTH, TINY_STEPS

    full, shared = work(tmp_path), work(tmp_path, "prefix")
    assert full.tokens > 0.6 * TINY_LENGTH * full.steps * full.batch * full.accumulate
    assert full.steps == shared.steps == TINY_STEPS
    lines = Path(shared.rows).read_text(encoding="utf-8").splitlines()
    assert len(lines) == shared.steps * shared.batch * shared.accumulate
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) == 1


def test_one_library_of_bitsandbytes_is_carried(tmp_path: Path) -> None:
    from gpu.pack import keep_one_library

    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["cpu", "cuda118", "cuda130", "rocm70"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(f"bitsandbytes/libbitsandbytes_{name}.so", name)
        file.writestr("bitsandbytes-1.dist-info/RECORD", "stale\n")
    with pytest.raises(SystemExit, match="--cuda 999: bitsandbytes has cuda118, cuda130, rocm70"):
        keep_one_library(wheel, "999")
    keep_one_library(wheel, "130")
    with zipfile.ZipFile(wheel) as file:
        kept = [name for name in file.namelist() if name.endswith(".so")]
        record = file.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert [Path(name).stem.split("_")[1] for name in kept] == ["cpu", "cuda130"]
    assert "cuda118" not in record
    assert record.count("sha256=") == 2


def test_a_test_that_passed_is_left_out(tmp_path: Path) -> None:
    from gpu.prove import Notes

    path = tmp_path / "tests.json"
    path.write_text(json.dumps({"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}))

    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    items: Any = [Item("a"), Item("b"), Item("c")]
    Notes(path, None, time.time()).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["b", "c"]


def test_a_machine_that_lacks_something_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(RUN), "lora", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no torch, numpy" in done.stderr
