"""Runs of tests: training in the process of the test, and the files of a run."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ftlevel.cli.app import run
from ftlevel.config import TrainConfig

ModelDir = Callable[..., Path]
"""Type of the fixture `tiny_model_dir`."""


def train(*words: object, out: str | Path = "run") -> dict[str, Any]:
    """Run `ftlevel train` without output in `out` and return its summary."""
    assert run(["train", "--quiet", "--output-dir", str(out), *map(str, words)]) == 0
    return read_summary(out)


def short_config(
    model: object, data: object, out: object, task: str = "text-generation", /, **sections: Any
) -> TrainConfig:
    """Return the configuration of a run of 3 steps in float32 on the CPU.

    Args:
        model: name or directory.
        data: dataset.
        out: output directory.
        task: its name.
        sections: further values: `train={"save_steps": 1}`, `method={"kind": "full"}`.
    """
    values: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(data)},
        "train": {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1},
        "output": {"dir": str(out)},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig.model_validate(values)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: str | Path, rows: Iterable[object]) -> Path:
    """Write a JSON Lines file; return its path."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def read_summary(run_dir: str | Path = "run") -> dict[str, Any]:
    """Return summary.json of a run."""
    summary: dict[str, Any] = read_json(Path(run_dir, "summary.json"))
    return summary


def read_losses(run_dir: str | Path = "run") -> list[float]:
    """Return the training losses of a run."""
    records = read_rows(Path(run_dir, "metrics.jsonl"))
    return [record["loss"] for record in records if "loss" in record]


def read_weights(run_dir: str | Path = "run") -> bytes:
    """Return the bytes of the trained weights of a run."""
    files = sorted(Path(run_dir, "adapter").glob("*.safetensors"))
    return b"".join(path.read_bytes() for path in files)


def kill_repeatedly(
    write: Callable[[], object], out: Path, kills: int, assert_complete: Callable[[], None]
) -> None:
    """Kill `write` at random times; `out` is then absent or complete, and each occurs.

    Args:
        write: writes `out`; called in this process first, then in forks.
        out: file or directory, removed after each call.
        kills: number of kills between the start and a third after the end.
        assert_complete: raises if `out` is not what `write` writes.
    """

    def remove() -> None:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    started = time.perf_counter()
    write()
    seconds = time.perf_counter() - started
    remove()
    fork, rng, exists = multiprocessing.get_context("fork"), random.Random(0), []
    for delay in [0.0, *(rng.uniform(0, 1.3 * seconds) for _ in range(kills)), None]:
        process = fork.Process(target=write)
        process.start()
        process.join(delay)  # None: not killed
        process.kill()
        process.join()
        exists.append(out.exists())
        if exists[-1]:
            assert_complete()
        remove()
    assert {True, False} == set(exists), "kills both before and after the end"
