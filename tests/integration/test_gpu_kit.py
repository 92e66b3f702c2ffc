"""The kit of measurements for a GPU machine.

To run all of it on a CPU in minutes: `make gpu-kit`, and then each of its commands with `--tiny`.
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
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from gpu import measure

    monkeypatch.setattr(measure, "measure_peak", lambda work: 1e9)
    return measure.Measurements(tmp_path / "out/lora.json", None)


def build_work(folder: Path, shape: str = "2k") -> Any:
    from gpu.model import write_llama
    from gpu.rows import build

    write_llama(folder / "tiny", "cpu", tiny=True)
    return build(shape, "none", folder / "tiny", folder / shape, tiny=True)


def create_reading() -> Any:
    from training.runs import Reading

    return Reading(2.0, 1.0, 100, 100, 50, 3, 150, 75, 2.0, 5.0, 1000.0, 1)


def test_finished_measurements_are_not_repeated(
    measurements: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.runs import FailedRunError

    from gpu import measure

    tiny_work, measured_tools = build_work(tmp_path), []
    measurements.path.parent.mkdir()

    def run(tool: Any, *_: Any) -> Any:
        measured_tools.append(tool.name)
        if tool.name == "plain":
            raise FailedRunError("out of memory")
        return create_reading()

    monkeypatch.setattr(measure, "measure_tool", run)
    assert not measure.measure_shape(
        "2k", tiny_work, measurements, tmp_path, time.time()
    )  # no time at all
    assert not measured_tools
    assert measure.measure_shape("2k", tiny_work, measurements, tmp_path, time.time() + 60)
    assert measured_tools == [tool.name for tool in measure.TOOLS]
    reloaded = measure.Measurements(measurements.path, None)
    assert measure.measure_shape("2k", tiny_work, reloaded, tmp_path, time.time() + 60)
    with_previous = measure.Measurements(tmp_path / "elsewhere/lora.json", measurements.path.parent)
    assert measure.measure_shape("2k", tiny_work, with_previous, tmp_path, time.time() + 60)
    assert len(measured_tools) == len(measure.TOOLS)
    table = measurements.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| ftlevel | 50 |" in table
    assert "- plain: out of memory" in table


def test_run_ended_by_time_limit_is_not_recorded(
    measurements: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.runs import FailedRunError

    from gpu import measure

    def run(*_: Any) -> Any:
        time.sleep(0.3)
        raise FailedRunError("ended with -9")

    monkeypatch.setattr(measure, "measure_tool", run)
    tiny_work = build_work(tmp_path)
    deadline = time.time() + measure.SPARE_SECONDS + 0.2
    assert not measure.measure_shape("2k", tiny_work, measurements, tmp_path, deadline)
    assert measurements.results["shapes"]["2k"]["refused"] == {}


def test_time_limit_prevents_measurements_and_peak_is_measured_once(
    measurements: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import measure

    peaks: list[Any] = []
    monkeypatch.setattr(measure, "measure_peak", lambda work: peaks.append(work) or 1e9)
    monkeypatch.setattr(measure, "measure_tool", lambda *_: create_reading())
    works = {shape: build_work(tmp_path, shape) for shape in ("2k", "prefix")}
    measurements.path.parent.mkdir()
    for shape, shape_work in works.items():
        assert not measure.measure_shape(shape, shape_work, measurements, tmp_path, time.time())
    assert measurements.results["shapes"] == {}
    assert not peaks
    for shape, shape_work in works.items():
        assert measure.measure_shape(shape, shape_work, measurements, tmp_path, time.time() + 60)
    assert len(peaks) == 1


def test_rows_have_requested_shape(tmp_path: Path) -> None:
    from gpu.rows import TINY_LENGTH, TINY_STEPS

    full, shared = build_work(tmp_path), build_work(tmp_path, "prefix")
    assert full.tokens > 0.6 * TINY_LENGTH * full.steps * full.batch * full.accumulate
    assert full.steps == shared.steps == TINY_STEPS
    lines = Path(shared.rows).read_text(encoding="utf-8").splitlines()
    assert len(lines) == shared.steps * shared.batch * shared.accumulate
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) == 1


def test_wheel_keeps_one_cuda_library(tmp_path: Path) -> None:
    from gpu.pack import reduce_bitsandbytes

    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["cpu", "cuda118", "cuda130", "rocm70"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names:
            file.writestr(f"bitsandbytes/libbitsandbytes_{name}.so", name)
        file.writestr("bitsandbytes-1.dist-info/RECORD", "stale\n")
    with pytest.raises(SystemExit, match="--cuda 999: bitsandbytes has cuda118, cuda130, rocm70"):
        reduce_bitsandbytes(wheel, "999")
    reduce_bitsandbytes(wheel, "130")
    with zipfile.ZipFile(wheel) as file:
        libraries = [name for name in file.namelist() if name.endswith(".so")]
        record = file.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert [Path(name).stem.split("_")[1] for name in libraries] == ["cpu", "cuda130"]
    assert "cuda118" not in record
    assert record.count("sha256=") == 2


def test_passed_tests_are_deselected(tmp_path: Path) -> None:
    from gpu.prove import OutcomeRecorder

    path = tmp_path / "tests.json"
    path.write_text(json.dumps({"a": {"outcome": "passed"}, "b": {"outcome": "failed"}}))

    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    items: Any = [Item("a"), Item("b"), Item("c")]
    OutcomeRecorder(path, None, time.time()).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["b", "c"]


def test_missing_packages_are_reported(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-I", "-S", str(RUN), "lora", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert "has no torch, numpy" in process.stderr
