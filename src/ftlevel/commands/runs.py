"""`runs`: list the runs in a directory with their results, and remove their old checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.checkpoints import (
    MANIFEST,
    best_of,
    get_last_valid_checkpoint,
    numbered,
    step_of,
)
from ftlevel.artifacts.files import lock_dir
from ftlevel.artifacts.run_directory import CHECKPOINTS, CONFIG, RunDirectory, is_run
from ftlevel.config.layers import load_recipe
from ftlevel.errors import ConfigError, InputError


@dataclass(frozen=True)
class RunInfo:
    """A run, for the list; `result` is its main metric, or how far it got."""

    run: str
    task: str
    base: str
    method: str
    result: str

    def to_dict(self) -> dict[str, str]:
        """Returns the fields, for `--json`."""
        return asdict(self)


def list_runs(directory: Path) -> list[RunInfo]:
    """Returns the runs in `directory` and in the directories in it, or `directory` if it is one.

    Raises InputError if there is none.
    """
    return [_describe(run) for run in _find(directory)]


def _find(directory: Path) -> list[Path]:
    below = () if is_run(directory) else ("*", "*/*")
    candidates = [directory, *sorted(path for each in below for path in directory.glob(each))]
    runs = [path for path in candidates if not path.is_symlink() and is_run(path)]
    if not runs:
        raise InputError(f"{directory} has no run. Name the directory that you train in.")
    return runs


def _describe(run: Path) -> RunInfo:
    try:
        config = load_recipe(run / CONFIG).values
        summary: dict[str, Any] = RunDirectory(run).load_summary() or {}
        model, method = config.get("model", {}), config.get("method", {})
        task, base, kind = config.get("task"), model.get("name_or_path"), method.get("kind")
        return RunInfo(str(run), f"{task}", f"{base}", f"{kind}", _get_result(run, summary))
    except (ConfigError, AttributeError, TypeError, ValueError):
        return RunInfo(str(run), "", "", "", f"{CONFIG} or summary.json cannot be read")


def _get_result(run: Path, summary: dict[str, Any]) -> str:
    metrics, name = summary.get("metrics") or {}, summary.get("headline")
    name = name if name in metrics else "loss"
    if name in metrics:
        return f"{name} {metrics[name]:.4f}"
    if summary:
        return f"finished, step {summary.get('steps')}"
    steps = [step_of(checkpoint) for checkpoint in numbered(run / CHECKPOINTS)]
    return f"unfinished, checkpoint of step {steps[-1]:,}" if steps else "unfinished, no checkpoint"


def list_old_checkpoints(directory: Path) -> dict[Path, int]:
    """Returns checkpoint → bytes of all but the last valid one and the best of each run."""
    return {
        checkpoint: sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        for run in _find(directory)
        for checkpoint in _list_old(run)
    }


def _list_old(run: Path) -> Iterator[Path]:
    parent = run / CHECKPOINTS
    last, _ = get_last_valid_checkpoint(parent)
    if last is None or parent.is_symlink():
        return
    best = (RunDirectory(run).load_summary() or {}).get("best") or {}
    steps = {step_of(last), best.get("best_step"), best.get("kept_step")}
    for checkpoint in numbered(parent):
        step = step_of(checkpoint)
        is_kept = step in steps or step > step_of(last) or best_of(parent, step).exists()
        if not is_kept and not checkpoint.is_symlink() and (checkpoint / MANIFEST).is_file():
            yield checkpoint


def remove_checkpoints(checkpoints: Sequence[Path]) -> None:
    """Delete `checkpoints`; raises ConfigError if a process is writing to one of their runs."""
    for checkpoint in checkpoints:
        with lock_dir(checkpoint.parent.parent, flag="runs clean"):
            shutil.rmtree(checkpoint)
