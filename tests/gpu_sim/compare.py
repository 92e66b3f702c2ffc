"""Run cells on the simulated device and on the CPU, and compare what they print and write.

A worker process per device runs the commands of a cell as forks of a process that has imported the
libraries, so that a command starts in 0.1 s (`forked.py`).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_sim import device
from gpu_sim.commands import KILLED, Cell

MAX_ERROR_OF_PLAN = 0.05
"""Largest relative difference of the peak and the estimate of `plan`."""
TIMEOUT = 300.0
"""Seconds that a command may take."""
_IGNORED = ("peak", "seconds", "_s", "memory", "elapsed", "tokens_per", "speed")
"""Parts of the names of metrics that differ between devices."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Outcome:
    """What the commands of a cell did on one device.

    Attributes:
        codes: exit codes.
        output: text of both streams of the last command that ran.
        warnings: lines that begin with `warning`, numbers replaced by #.
        losses: training losses by step.
        metrics: metrics of summary.json.
        waits: waits of the host in training steps after the second, by source line.
        peak: largest memory on the device in bytes.
        seconds: duration.
    """

    codes: list[int] = field(default_factory=list)
    output: str = ""
    warnings: set[str] = field(default_factory=set)
    losses: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    seconds: float = 0.0


@dataclass
class Result:
    """A cell's outcomes on both devices, and what is wrong with it."""

    cell: Cell
    card: Outcome
    cpu: Outcome
    problems: list[str] = field(default_factory=list)

    @property
    def planned(self) -> float:
        """Peak that `plan` estimates for tensors, in bytes, without the CUDA context."""
        start = self.card.output.index("{")
        parts = json.JSONDecoder().raw_decode(self.card.output[start:])[0]["parts"]
        return float(sum(size for name, size in parts.items() if "context" not in name))

    @property
    def distance(self) -> float:
        """Largest relative difference of a loss; infinite if one is NaN."""
        pairs = [(self.card.losses[at], self.cpu.losses[at])
                 for at in self.card.losses.keys() & self.cpu.losses.keys()]  # fmt: skip
        distances = [abs(a - b) / max(abs(b), 0.05) for a, b in pairs]
        return math.inf if any(map(math.isnan, distances)) else max(distances, default=0.0)


class Worker:
    """A process that runs commands of ftlevel on the device, or on the CPU."""

    def __init__(self, is_card: bool, names: Mapping[str, str]) -> None:
        self._names = names
        self._temporary = tempfile.TemporaryDirectory()
        environment = device.build_environment() if is_card else dict(os.environ)
        environment["FTLEVEL_TESTS_FORKS"] = f"{self._temporary.name}/forks"
        environment["HF_HUB_OFFLINE"] = "1"
        self.is_card = is_card
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpu_sim.compare"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, cell: Cell, folder: Path) -> Outcome:
        """Run the commands of `cell` in `folder`, until one fails."""
        folder.mkdir(parents=True)
        outcome, reports = Outcome(), folder / "reports"
        start = time.monotonic()
        settings = cell.card if self.is_card else {}
        environment = {f"SIMULATED_{name.upper()}": str(value) for name, value in settings.items()}
        if self.is_card:
            environment["SIMULATED_REPORT"] = str(reports)
        for line in cell.lines:
            for old, new in () if self.is_card else cell.otherwise:
                line = line.replace(old, new)
            reply = self._call({
                "arguments": shlex.split(line.format(**self._names)), "cwd": str(folder),
                "env": environment,
            })  # fmt: skip
            outcome.codes.append(reply["code"])
            outcome.output = reply["output"]
            outcome.warnings |= {
                _NUMBER.sub("#", text.strip()) for text in reply["output"].splitlines()
                if text.strip().lower().startswith("warning")
            }  # fmt: skip
            if reply["code"] and not line.startswith(KILLED):
                break
        outcome.seconds = time.monotonic() - start
        _read_run(folder / "run", outcome)
        for report in device.read_reports(reports) if reports.exists() else ():
            outcome.peak = max(outcome.peak, report["peak"])
            for where, count in report["waits"].items():
                outcome.waits[where] = outcome.waits.get(where, 0) + count
        return outcome

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._temporary.cleanup()


def compare(cell: Cell, card: Worker, cpu: Worker, folder: Path) -> Result:
    """Run `cell` on both devices."""
    name = cell.name.replace("/", "-")
    on_card = card.run(cell, folder / f"{name}-card")
    on_cpu = cpu.run(cell, folder / f"{name}-cpu")
    result = Result(cell, on_card, on_cpu)
    result.problems = list(_find_problems(result))
    return result


def _find_problems(result: Result) -> Any:
    cell, card, cpu = result.cell, result.card, result.cpu
    if any(cpu.codes[-1:]):
        yield f"the CPU's run failed: {_last_line(cpu.output)}"
        return
    if any(card.codes[-1:]):
        yield f"exit {card.codes[-1]}: {_last_line(card.output)}"
        return
    for text in sorted(card.warnings - cpu.warnings):
        yield f"warning only on the card: {text}"
    if card.losses.keys() != cpu.losses.keys():
        yield f"steps differ: {sorted(card.losses)} and {sorted(cpu.losses)}"
    if not result.distance <= cell.tolerance:
        yield f"losses differ by {result.distance:.2g}: {card.losses} and {cpu.losses}"
    for name in sorted(card.metrics.keys() | cpu.metrics.keys()):
        one, other = card.metrics.get(name, math.nan), cpu.metrics.get(name, math.nan)
        if "loss" in name and not abs(one - other) <= cell.tolerance * max(abs(other), 0.05):
            yield f"{name} is {one:.5g} and {other:.5g} on the CPU"
    if cell.is_planned and not abs(result.planned / card.peak - 1) <= MAX_ERROR_OF_PLAN:
        yield f"the peak is {card.peak / 1e6:.1f} MB, and {result.planned / 1e6:.1f} were planned"
    if card.waits and not cell.waits:
        yield f"the host waits in a step: {card.waits}"


def _read_run(run: Path, outcome: Outcome) -> None:
    log = run / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        record = json.loads(line)
        if "loss" in record and "step" in record:
            outcome.losses[record["step"]] = record["loss"]
    summary = run / "summary.json"
    if summary.exists():
        metrics = json.loads(summary.read_text(encoding="utf-8")).get("metrics", {})
        outcome.metrics = {
            name: value for name, value in metrics.items()
            if isinstance(value, float) and not any(part in name for part in _IGNORED)
        }  # fmt: skip


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "(no output)"


def _start_interpreter(arguments: Sequence[str], **settings: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "ftlevel", *arguments], text=True, stdin=subprocess.DEVNULL,
        **settings,
    )  # fmt: skip


def serve() -> None:
    """Run the commands that arrive on stdin as JSON lines."""
    import forked

    for text in sys.stdin:
        request = json.loads(text)
        arguments: Sequence[str] = request["arguments"]
        process: Any
        cwd, env = Path(request["cwd"]), {**os.environ, **request["env"]}
        if arguments[0] == KILLED:
            process = forked.Forked(
                call=(forked.run_slowly, (arguments[1:],)), cwd=cwd, env=env,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            checkpoints, end = cwd / "run" / "checkpoints", time.monotonic() + TIMEOUT
            while not list(checkpoints.glob("*/manifest.json")) and time.monotonic() < end:
                time.sleep(0.02)
            process.kill()
        else:
            # A process that has used autograd's threads of a GPU cannot fork the runs of `compare`.
            start = _start_interpreter if arguments[0] == "compare" else forked.Forked
            process = start(
                arguments, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        try:
            output, _ = process.communicate(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"timed out after {TIMEOUT:.0f} s"
        reply = {"code": process.wait(), "output": output}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
