"""The kit of measurements for a GPU machine.

To run all of it on a CPU in minutes: `make gpu-kit`, and then each of its commands with `--tiny`.
"""

from __future__ import annotations

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


def test_missing_packages_are_reported(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-I", "-S", str(RUN), "lora", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert "has no torch, numpy" in process.stderr
