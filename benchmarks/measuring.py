"""Shared by the benchmarks: machine description, measured processes, Markdown tables."""

from __future__ import annotations

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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Resources of a process: seconds of wall clock and CPU, and peak private memory in bytes.

    Private memory is RssAnon of /proc (Linux), polled every 5 ms. Mapped file pages, which the
    kernel can drop, do not count.
    """

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str], limit: int | None = None, path: str = "") -> tuple[int, Usage, str]:
    """Run `command` offline, and return its exit code, its usage and its output.

    `limit` is RLIMIT_DATA in bytes, which includes imports and needs no privileges. `path` is put
    before PYTHONPATH.
    """

    def lower_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have bytecode
    if path:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    before, start, peak = cpu_seconds(), time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, preexec_fn=lower_limit
        )
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.005)
        usage = Usage(time.perf_counter() - start, cpu_seconds() - before, peak)
        output.seek(0)
        return process.returncode, usage, output.read().decode(errors="replace").strip()


def run_checked(command: Sequence[str], path: str = "") -> tuple[Usage, str]:
    """Run `command` as `run` does, and exit with its last line if it fails."""
    code, usage, output = run(command, path=path)
    if code:
        sys.exit(f"error: {' '.join(command)} exited with {code}: {output.splitlines()[-1:]}")
    return usage, output


def run_side(option: str, side: str, path: str = "") -> Any:
    """Run this command with `option side` in a separate process, and parse its last line."""
    output = run_checked([sys.executable, *sys.argv, option, side], path)[1]
    return json.loads(output.splitlines()[-1])


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def private_bytes(pid: int | str = "self") -> int:
    """Return the private memory of a process in bytes; 0 if it has ended, or outside Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines.splitlines() if line.startswith("RssAnon:")]
    return int(sizes[0]) << 10 if sizes else 0


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
