"""Shared by the benchmarks: machine description, measured processes, Markdown tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Resources of a process: seconds of wall clock and CPU, and peak resident memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(command: Sequence[str], path: str = "") -> tuple[Usage, str]:
    """Run `command` offline, and return its usage and its output; exit if it fails.

    `path` is put before PYTHONPATH.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have bytecode
    if path:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    start = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        file.seek(0)
        output = file.read().decode(errors="replace").strip()
    if code:
        sys.exit(f"error: {' '.join(command)} exited with {code}: {output.splitlines()[-1:]}")
    return Usage(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024), output


def compare_sides(
    parser: argparse.ArgumentParser, measures: Mapping[str, Callable[[argparse.Namespace], Any]]
) -> tuple[argparse.Namespace, dict[str, list[Any]]]:
    """Parse the command line, and measure its sides in turn, each in separate processes.

    `measures` maps sides to functions that return values for JSON. In the process of a side, its
    values are printed, and the process ends.
    """
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", default=",".join(measures), help="separated by commas")
    parser.add_argument("--peer", default="", help="directory of the other library")
    parser.add_argument("--side", choices=measures, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measures[args.side](args)))
        sys.exit()

    def measure(side: str) -> Any:
        path = "" if side == "ftlevel" else args.peer
        return json.loads(
            run([sys.executable, *sys.argv, "--side", side], path)[1].splitlines()[-1]
        )

    cases = {side: partial(measure, side) for side in args.sides.split(",")}
    return args, alternate(cases, args.rounds, warm_ups=0)


def own_peak_mib() -> float:
    """Return the peak resident memory of this process, with libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_clock(ends: list[float]) -> Any:
    """Return a callback of a Trainer that appends the CPU seconds at the end of each step."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    return StepClock()


def alternate(
    cases: Mapping[str, Callable[[], T]], runs: int, warm_ups: int = 1
) -> dict[str, list[T]]:
    """Measure each case `runs` times, alternating, after `warm_ups` that do not count."""
    results: dict[str, list[T]] = {name: [] for name in cases}
    for index in range(warm_ups + runs):
        print(f"round {index + 1} of {warm_ups + runs}", file=sys.stderr, flush=True)
        for name, measure in cases.items():
            result = measure()
            if index >= warm_ups:
                results[name].append(result)
    return results


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine() -> str:
    """Return one line with the CPU, the memory, the load and the versions in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [
        names[0] if names else platform.processor() or platform.machine(),
        f"{os.cpu_count()} CPUs",
    ]
    if "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{size / 2**30:.0f} GiB")
    parts.append(f"Python {platform.python_version()}")
    for package in ("torch", "transformers", "peft"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    parts.append(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    return ", ".join(parts)
