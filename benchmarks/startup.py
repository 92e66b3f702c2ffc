#!/usr/bin/env python3
"""How long ftlevel takes to answer, and to reach the first training step.

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 9 --trl-python ~/venvs/trl/bin/python
    python benchmarks/startup.py --no-train

Every command is started once to warm the disk cache and then `--runs` times; the commands take
turns, so that a busy moment of the machine meets all of them. Times are from the start of the
process; on a busy machine compare processor seconds, which are beside them. Python keeps its
bytecode, as it does of an installed package: PYTHONDONTWRITEBYTECODE would have ftlevel compiled
anew in each run. The first training step of `ftlevel train` stands beside a bare script that
imports torch, transformers and peft, loads the same model and adds LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"

BARE_SCRIPT = """
import sys, time
import psutil, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
print(time.time() - psutil.Process().create_time(), time.process_time())
"""


class BenchmarkError(Exception):
    """A command that is measured failed; the message has its last words."""


@dataclass
class Case:
    """One thing to measure: `measure` runs it once and returns seconds, and those of processors."""

    name: str
    measure: Callable[[], tuple[float, float]]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Return the median of the runs so far."""
        return statistics.median(self.seconds)

    @property
    def median_processor(self) -> float:
        """Return the median of the processor seconds so far."""
        return statistics.median(self.processor)


def console_script(python: Path, name: str) -> list[str]:
    """Return the command for a console script of the environment that `python` belongs to."""
    script = python.parent / name
    return [str(script)] if script.exists() else [str(python), "-m", name]


def run(command: Sequence[str]) -> str:
    """Run `command` without a hub and return its stdout; raise BenchmarkError when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}: {' '.join(said)}")
    return done.stdout


def time_command(command: Sequence[str]) -> tuple[float, float]:
    """Return the seconds from starting `command` to its end, and those of processors."""
    began, used = time.perf_counter(), _processor_seconds()
    run(command)
    return time.perf_counter() - began, _processor_seconds() - used


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def time_first_step(ftlevel: Sequence[str], model: Path) -> tuple[float, float]:
    """Return the seconds of both kinds from the start of `ftlevel train` to its first step."""
    with tempfile.TemporaryDirectory(prefix="ftlevel-startup-") as temporary:
        output = Path(temporary) / "run"
        flags = ["--method", "lora", "--model", str(model), "--max-steps", "1"]
        flags += ["--set", "data.max_eval_samples=8"]  # what follows the step is not measured
        run([*ftlevel, "train", *flags, "--output-dir", str(output), "--quiet"])
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    timings = summary["timings"]
    return float(timings["to_first_step_s"]), float(timings["to_first_step_cpu_s"])


def time_bare_script(model: Path) -> tuple[float, float]:
    """Return the seconds of both kinds that the bare script needs, from its process's start."""
    *_, seconds, processor = run([sys.executable, "-c", BARE_SCRIPT, str(model)]).split()
    return float(seconds), float(processor)


def measure(cases: Sequence[Case], runs: int) -> None:
    """Measure every case `runs` times, in turns, after one run each that does not count."""
    for case in cases:
        case.measure()
    for number in range(runs):
        print(f"round {number + 1} of {runs}", file=sys.stderr)
        for case in cases:
            seconds, processor = case.measure()
            case.seconds.append(seconds)
            case.processor.append(processor)


def table(cases: Sequence[Case], against: Case) -> str:
    """Return a Markdown table; the last columns are medians divided by those of `against`."""
    lines = [
        "| | median s | fastest s | slowest s | processor s, median | "
        f"× {against.name} | × in processor s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        row = [case.median, min(case.seconds), max(case.seconds), case.median_processor]
        row += [case.median / against.median, case.median_processor / against.median_processor]
        lines.append(f"| {case.name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return "\n".join(lines)


def describe_machine() -> str:
    """Return one line on the processor, the memory, the load and the versions in play."""
    facts = [
        _processor(),
        f"{os.cpu_count()} CPUs",
        _memory(),
        f"Python {platform.python_version()}",
    ]
    for package in ("torch", "transformers", "peft"):
        try:
            facts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            facts.append(f"no {package}")
    if hasattr(os, "getloadavg"):
        facts.append(f"load {os.getloadavg()[0]:.1f}")
    facts.append(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    return ", ".join(facts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def trl_command(path: Path) -> list[str]:
    """Return the command for `trl` of the environment whose python, or bin folder, is `path`."""
    folder = path if path.is_dir() else path.parent
    script = shutil.which("trl", path=str(folder))
    if script is None:
        raise BenchmarkError(f"--trl-python: there is no trl in {folder}. Install it there first.")
    return [script]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command")
    parser.add_argument("--trl-python", type=Path, help="python or bin folder that has trl")
    parser.add_argument("--model", type=Path, default=MODEL, help="for the first training step")
    parser.add_argument("--no-train", action="store_true", help="measure the help texts only")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: at least one run is needed.")
    if not arguments.no_train and not arguments.model.is_dir():
        parser.error(
            f"--model: {arguments.model} is not there. "
            "Run: python scripts/fetch_models.py smollm2, or pass --no-train."
        )
    return arguments


def command_cases(ftlevel: Sequence[str], trl_python: Path | None) -> list[Case]:
    """Return the commands that load no model."""
    commands = {
        "`ftlevel --help`": [*ftlevel, "--help"],
        "`ftlevel train --help`": [*ftlevel, "train", "--help"],
        "`ftlevel list-targets llama`": [*ftlevel, "list-targets", "llama"],
    }
    if trl_python is not None:
        commands["`trl --help`"] = [*trl_command(trl_python), "--help"]
        commands["`trl sft --help`"] = [*trl_command(trl_python), "sft", "--help"]
    return [
        Case(name, lambda command=command: time_command(command))  # type: ignore[misc]
        for name, command in commands.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    arguments = parse_arguments(argv)
    ftlevel = console_script(Path(sys.executable), "ftlevel")
    try:
        answers = command_cases(ftlevel, arguments.trl_python)
        measure(answers, arguments.runs)
        print(f"{describe_machine()}; {arguments.runs} runs in turns.\n")
        print(table(answers, answers[0]))
        if not arguments.no_train:
            bare = Case("bare script", lambda: time_bare_script(arguments.model))
            first = Case(
                "`ftlevel train` to the first step",
                lambda: time_first_step(ftlevel, arguments.model),
            )
            measure([bare, first], arguments.runs)
            print(f"\nOn {arguments.model.name}:\n")
            print(table([bare, first], bare))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
