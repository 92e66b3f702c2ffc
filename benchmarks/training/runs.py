"""Run one training command in a process of its own, and read its metered steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METER = Path(__file__).resolve().parent / "meter"
LOOK_SECONDS = 0.05  # between two looks at the memory of a run

# Nobody's telemetry, no hub, and no check of versions that this benchmark did not choose.
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "DISABLE_VERSION_CHECK": "1", "WANDB_DISABLED": "true",
}  # fmt: skip


class FailedRunError(Exception):
    """A process ended with an error or made too few steps; the message has its last words."""


@dataclass(frozen=True)
class Reading:
    """One run: what lies between the end of its first step and the end of the last, and the whole.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of the process.
        tokens: without padding.
        places: tokens with padding.
        supervised: tokens that are scored; rows, in classification.
        steps: optimizer steps of the whole run, as all that follows.
        all_tokens: like `tokens`.
        all_supervised: like `supervised`.
        loss: mean of the steps' losses, each as often as it has supervised tokens: tools that sort
            or pack have steps of other sizes.
        first_step_s: from the start of the process to the beginning of the first step.
        peak_mib: resident set, or what CUDA allocated.
        private_mib: resident memory that is not of a file (weights may be mapped), looked at 20
            times a second; 0 where the system does not tell.
        private_training_mib: like `private_mib`, from the first step to the last: without what
            prepares, and what saves and checks afterwards.
        threads: torch's, when the process ended.
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
    private_mib: float
    private_training_mib: float
    threads: int


def run_metered(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    with_path: bool = True,
    limit_seconds: float = 1200,
) -> Reading:
    """Run `command` in `folder` and read it.

    Args:
        command: the program and its arguments.
        folder: for its files; made if it is not there. Its output goes to `log` in it.
        environment: what is set beside this process's own.
        with_path: whether this process's PYTHONPATH is the command's, too.
        limit_seconds: when it is ended.

    Raises:
        FailedRunError: it failed, was ended, or made fewer than two steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    events_file = folder / "events"
    events_file.unlink(missing_ok=True)
    inherited = os.environ.get("PYTHONPATH") if with_path else None
    whole = {
        **os.environ, **QUIET, "TRAIN_METER": str(events_file),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(METER), *([inherited] if inherited else [])]),
        **(environment or {}),
    }  # fmt: skip
    with (folder / "log").open("w", encoding="utf-8") as log:
        began = time.time()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=whole, cwd=folder,
        )  # fmt: skip
        code, resident_mib, looks = _follow(process, began + limit_seconds)
    lines = events_file.read_text("utf-8").splitlines() if events_file.exists() else []
    events = [json.loads(line) for line in lines]
    steps = sum(event["kind"] == "step" for event in events)
    if code != 0 or steps < 2:
        raise FailedRunError(f"ended with {code} after {steps} steps: {_last_words(folder)}")
    return read_events(events, began, resident_mib, looks)


def _follow(
    process: subprocess.Popen[bytes], until: float
) -> tuple[int, float, list[tuple[float, float]]]:
    """Wait for the process; return its exit code, MiB resident, and times with MiB private."""
    looks: list[tuple[float, float]] = []
    while True:
        looks.append((time.time(), sum(_private_mib(pid) for pid in _family(process.pid))))
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not done and time.time() > until:
            process.kill()
            done, status, usage = os.wait4(process.pid, 0)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            unit = 1 if os.uname().sysname == "Darwin" else 1024
            return process.returncode, usage.ru_maxrss * unit / 2**20, looks
        time.sleep(LOOK_SECONDS)


def _family(pid: int) -> list[int]:
    """Return the process and its children's children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except OSError:
        children = []
    return [pid, *(relative for child in children for relative in _family(int(child)))]


def _private_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def _last_words(folder: Path) -> str:
    """Return the line of the log that names the error, or its end."""
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    named = [line for line in lines if re.match(r"\s*(\w+\.)*\w*(Error|Exception|error)\b", line)]
    return (named[-1] if named else " ".join(lines[-3:])).strip()[:300]


def read_events(
    events: Sequence[dict[str, Any]],
    began: float,
    resident_mib: float,
    looks: Sequence[tuple[float, float]],
) -> Reading:
    """Return the reading of a run.

    Args:
        events: the meter's lines.
        began: when the process began, in seconds since the epoch, as everywhere.
        resident_mib: at most.
        looks: times, and MiB that were private then.
    """
    steps = [event for event in events if event["kind"] == "step"]
    micros: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if event["kind"] == "micro":
            micros[-1].append(event)
        elif event["kind"] == "step":
            micros.append([])
    of_steps = micros[: len(steps)]  # the last is what followed the last step
    counted = [micro for group in of_steps[1:] for micro in group]
    whole = [micro for group in of_steps for micro in group]
    losses = [
        sum(m["loss"] if m["share"] else m["loss"] / len(group) for m in group)
        for group in of_steps
    ]
    scored = [sum(m["supervised"] for m in group) for group in of_steps]
    cuda = [event["mib"] for event in events if event["kind"] == "cuda"]
    return Reading(
        seconds=steps[-1]["wall"] - steps[0]["wall"],
        cpu_seconds=steps[-1]["cpu"] - steps[0]["cpu"],
        tokens=sum(m["tokens"] for m in counted),
        places=sum(m["places"] for m in counted),
        supervised=sum(m["supervised"] for m in counted),
        steps=len(steps),
        all_tokens=sum(m["tokens"] for m in whole),
        all_supervised=sum(m["supervised"] for m in whole),
        loss=sum(a * b for a, b in zip(losses, scored, strict=True)) / sum(scored),
        first_step_s=whole[0]["began"] - began,
        peak_mib=max(cuda, default=resident_mib),
        private_mib=max((mib for _, mib in looks), default=0.0),
        private_training_mib=max(
            (mib for at, mib in looks if whole[0]["began"] <= at <= steps[-1]["wall"]), default=0.0
        ),
        threads=max((e["count"] for e in events if e["kind"] == "threads"), default=0),
    )
