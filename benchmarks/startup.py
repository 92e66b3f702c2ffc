#!/usr/bin/env python3
"""Measure how fast `ftlevel` shows its help, and reaches the first training step.

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 9 --trl-python ~/venvs/trl/bin/python
    python benchmarks/startup.py --no-train

Commands alternate, after one uncounted run each. Times are from the start of the process; on a busy
machine, compare CPU seconds. The first training step of `ftlevel train` is
compared with a script that imports torch, transformers and peft, loads the same model and adds
LoRA.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import MODEL, alternate, describe_machine, markdown, run

BARE_SCRIPT = """
import sys, time
import psutil, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
print(time.time() - psutil.Process().create_time(), time.process_time())
"""
FTLEVEL = [sys.executable, "-m", "ftlevel"]
Times = tuple[float, float]
"""Seconds of wall clock and CPU."""


def time_command(command: Sequence[str]) -> Times:
    """Return the times from the start of `command` to its end."""
    usage, _ = run(command)
    return usage.wall, usage.cpu


def time_first_step(model: Path) -> Times:
    """Return the times from the start of `ftlevel train` to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        flags = ["--method", "lora", "--model", str(model), "--max-steps", "1"]
        flags += ["--set", "data.max_eval_samples=8"]  # later work is not measured
        run([*FTLEVEL, "train", *flags, "--output-dir", str(output), "--quiet"])
        timings = json.loads((output / "summary.json").read_text(encoding="utf-8"))["timings"]
    return float(timings["to_first_step_s"]), float(timings["to_first_step_cpu_s"])


def time_bare_script(model: Path) -> Times:
    """Return the times that the bare script reports."""
    _, output = run([sys.executable, "-c", BARE_SCRIPT, str(model)])
    *_, wall, cpu = output.split()
    return float(wall), float(cpu)


def compare(cases: dict[str, Callable[[], Times]], runs: int) -> str:
    """Return a table of the cases; the last columns are ratios to the first case."""
    results = alternate(cases, runs)
    medians = {
        name: [statistics.median(c) for c in zip(*r, strict=True)] for name, r in results.items()
    }
    first, base = next(iter(medians.items()))
    rows = []
    for name, (wall, cpu) in medians.items():
        walls = [times[0] for times in results[name]]
        values = [wall, min(walls), max(walls), cpu, wall / base[0], cpu / base[1]]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    head = ["", "median s", "fastest s", "slowest s", "CPU s, median", f"× {first}", "× in CPU s"]
    return markdown(head, rows)


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command")
    parser.add_argument("--trl-python", type=Path, help="python of an environment with trl")
    parser.add_argument("--model", type=Path, default=MODEL, help="for the first training step")
    parser.add_argument("--no-train", action="store_true", help="measure the help texts only")
    args = parser.parse_args()
    commands = {
        "`ftlevel --help`": [*FTLEVEL, "--help"],
        "`ftlevel train --help`": [*FTLEVEL, "train", "--help"],
        "`ftlevel list-targets llama`": [*FTLEVEL, "list-targets", "llama"],
    }
    if args.trl_python:
        script = shutil.which("trl", path=str(args.trl_python.parent))
        if script is None:
            parser.error(f"--trl-python: no trl in {args.trl_python.parent}.")
        commands["`trl --help`"] = [script, "--help"]
        commands["`trl sft --help`"] = [script, "sft", "--help"]
    print(f"{describe_machine()}; {args.runs} alternating runs.\n")
    help_cases = {n: lambda command=c: time_command(command) for n, c in commands.items()}  # type: ignore[misc]
    print(compare(help_cases, args.runs))
    if args.no_train:
        return
    if not args.model.is_dir():
        parser.error(f"--model: {args.model} does not exist. Run scripts/fetch_models.py.")
    print(f"\nOn {args.model.name}:\n")
    cases: dict[str, Callable[[], Times]] = {
        "bare script": lambda: time_bare_script(args.model),
        "`ftlevel train` to the first step": lambda: time_first_step(args.model),
    }
    print(compare(cases, args.runs))


if __name__ == "__main__":
    main()
