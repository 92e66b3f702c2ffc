"""Run one training command in a separate process, and read its metered steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METER = Path(__file__).resolve().parent / "meter"

# No telemetry, no hub, and no version checks.
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "DISABLE_VERSION_CHECK": "1", "WANDB_DISABLED": "true",
}  # fmt: skip


class FailedRunError(Exception):
    """A process failed or made too few steps; the message has its last output."""


@dataclass(frozen=True)
class Reading:
    """Measurements of one run, between the end of its first step and the end of its last.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of the process.
        tokens: without padding.
        places: tokens with padding.
        supervised: supervised tokens; rows, for classification.
        steps: optimizer steps of the whole run; the following fields are of the whole run, too.
        all_tokens: like `tokens`.
        all_supervised: like `supervised`.
        loss: mean of the steps' losses, weighted by supervised tokens: tools that sort or pack have
            steps of other sizes.
        first_step_s: from the start of the process to the start of the first step.
        peak_mib: resident set, or memory allocated by CUDA.
        threads: torch's, at the end of the process.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    places: int
    supervised: int
    steps: int
    all_tokens: int
    all_supervised: int
    loss: float
    first_step_s: float
    peak_mib: float
    threads: int


def run_metered(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    with_path: bool = True,
    limit_seconds: float = 1200,
) -> Reading:
    """Run `command` in `folder` and return its reading.

    Args:
        command: program and arguments.
        folder: directory for its files, created if needed; output goes to its file `log`.
        environment: additional environment variables.
        with_path: whether the command inherits PYTHONPATH.
        limit_seconds: timeout.

    Raises:
        FailedRunError: it failed, timed out, or made fewer than two steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    events_file = folder / "events"
    events_file.unlink(missing_ok=True)
    inherited = os.environ.get("PYTHONPATH") if with_path else None
    variables = {
        **os.environ, **QUIET, "TRAIN_METER": str(events_file),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(METER), *([inherited] if inherited else [])]),
        **(environment or {}),
    }  # fmt: skip
    with (folder / "log").open("w", encoding="utf-8") as log:
        start = time.time()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=variables, cwd=folder,
        )  # fmt: skip
        timer = threading.Timer(limit_seconds, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    lines = events_file.read_text("utf-8").splitlines() if events_file.exists() else []
    events = [json.loads(line) for line in lines]
    steps = sum(event["kind"] == "step" for event in events)
    if code != 0 or steps < 2:
        raise FailedRunError(f"ended with {code} after {steps} steps: {_error_line(folder)}")
    return read_events(events, start, usage.ru_maxrss * unit / 2**20)


def _error_line(folder: Path) -> str:
    """Return the line of the log with the error, or its end."""
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if re.match(r"\s*(\w+\.)*\w*(Error|Exception|error)\b", line)]
    return (errors[-1] if errors else " ".join(lines[-3:])).strip()[:300]


def read_events(events: Sequence[dict[str, Any]], start: float, resident_mib: float) -> Reading:
    """Return the reading of a run.

    Args:
        events: the meter's lines.
        start: start of the process, in seconds since the epoch, like all times.
        resident_mib: peak resident memory.
    """
    steps = [event for event in events if event["kind"] == "step"]
    micros: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if event["kind"] == "micro":
            micros[-1].append(event)
        elif event["kind"] == "step":
            micros.append([])
    step_groups = micros[: len(steps)]  # the last group follows the last step
    measured = [micro for group in step_groups[1:] for micro in group]
    all_micro_batches = [micro for group in step_groups for micro in group]
    losses = [sum(m["loss"] for m in group) for group in step_groups]
    weights = [sum(m["supervised"] for m in group) for group in step_groups]
    cuda = [event["mib"] for event in events if event["kind"] == "cuda"]
    return Reading(
        seconds=steps[-1]["wall"] - steps[0]["wall"],
        cpu_seconds=steps[-1]["cpu"] - steps[0]["cpu"],
        tokens=sum(m["tokens"] for m in measured),
        places=sum(m["places"] for m in measured),
        supervised=sum(m["supervised"] for m in measured),
        steps=len(steps),
        all_tokens=sum(m["tokens"] for m in all_micro_batches),
        all_supervised=sum(m["supervised"] for m in all_micro_batches),
        loss=sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights),
        first_step_s=all_micro_batches[0]["began"] - start,
        peak_mib=max(cuda, default=resident_mib),
        threads=max((e["count"] for e in events if e["kind"] == "threads"), default=0),
    )
