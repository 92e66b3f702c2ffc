#!/usr/bin/env python3
"""Compare `ftlevel train` with a plain Trainer + PEFT script and other tools.

    python benchmarks/train.py --venvs ~/venvs              all workloads, 20 steps, 3 rounds
    python benchmarks/train.py --workloads a b --steps 40 --peer trl=~/venvs/trl/bin/python
    python benchmarks/train.py --quick                      a smoke test on the built-in model

Every run is a separate process, and tools alternate in a round. A run is one epoch over its own
rows, the same for all tools; the meter (training/meter) counts the tokens of every micro-batch and
the end of every optimizer step in any tool. Per run, from the end of the first step to the end of
the last:

    real tok/s     tokens of the rows, without padding, per second
    supervised/s   supervised tokens per second (rows, for classification)
    tok/cpu-s      real tokens per CPU second: comparable on a busy machine, too
    MFU            4 · (weights of the blocks' linear layers · real tokens + weights of the head ·
                   supervised tokens) / seconds / peak, the necessary work of a step with a frozen
                   base (forward, and the gradient of activations; without attention and LoRA); the
                   peak is measured with a matrix product

The table has medians over the rounds, ratios to the plain script and to the best tool other than
ftlevel, and notes on tools with other tokens or losses. Peak memory is the process's resident set,
or the memory allocated by CUDA. `first step s` is from the start of the process to the start of the
first training step.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import describe_machine
from training import tools, workloads
from training.runs import FailedRunError, Reading, run_metered
from training.tables import summarize, workload_table
from training.workloads import Work

PEAK = """
import sys, time, torch
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
size = 8192 if device == "cuda" else 2048  # a small product would measure the launch
a = torch.randn(size, size, device=device).to(dtype)
best = 1e9
for _ in range(12):
    began = time.perf_counter()
    for _ in range(4): b = a @ a
    b.sum().item()
    best = min(best, (time.perf_counter() - began) / 4)
print(2 * size**3 / best)
"""


def run_tool(tool: tools.Tool, python: str, work: Work, folder: Path) -> Reading:
    """Run one tool once in `folder` and return its reading.

    Raises:
        UnsupportedError: the tool does not support the workload.
        FailedRunError: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = tool.command(work, folder, python)
    return run_metered(command, folder, tool.environment, with_path=not tool.peer)


def measure_peak(work: Work) -> float:
    """Return FLOP/s of a matrix product on the workload's device."""
    command = [sys.executable, "-c", PEAK, work.device, work.dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def run_workload(
    letter: str, args: argparse.Namespace, peers: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Run every tool on one workload, alternating, and return the results."""
    quick = {"dtype": "float32"} if args.quick else {}
    folder.mkdir(parents=True)
    work = workloads.build(letter, folder, args.steps, args.model, **quick)
    peak = measure_peak(work)
    readings: dict[str, list[Reading]] = {}
    refused: dict[str, str] = {}
    for index in range(args.rounds):
        for tool, python in tools.select(peers, args.only):
            if tool.name in refused:
                continue
            run_dir = (
                folder / f"{re.sub(r'[^a-z]+', '-', tool.name)}-{index + 1}"
            )  # separate directory
            try:
                reading = run_tool(tool, python, work, run_dir)
            except (tools.UnsupportedError, FailedRunError) as error:
                refused[tool.name] = str(error)
                print(f"{work.name}: {tool.name}: {error}", file=sys.stderr, flush=True)
                continue
            readings.setdefault(tool.name, []).append(reading)
            print(
                f"{work.name}: round {index + 1}: {tool.name}: {reading.seconds:.1f} s, "
                f"{reading.tokens / reading.seconds:.0f} tokens/s, loss {reading.loss:.4f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    weights = workloads.count_weights(Path(work.model), has_head=work.task != "text-classification")
    return {
        "work": asdict(work), "rounds": args.rounds, "peak_flops": peak, "weights": weights,
        "tools": summarize(readings, weights, peak), "refused": refused,
        "readings": {name: [asdict(r) for r in runs] for name, runs in readings.items()},
    }  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse the command line; also return the peers' Python paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices="abcd", default=list("abcd"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON",
        help=f"a tool and the Python of its environment: {', '.join(tools.PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--venvs", type=Path, metavar="FOLDER",
        help="folder with an environment for each tool, as FOLDER/trl",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="TOOL", choices=[tool.name for tool in tools.TOOLS],
        help=f"run these tools only: {', '.join(repr(tool.name) for tool in tools.TOOLS)}",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep rows and logs here")
    parser.add_argument("--model", type=Path, help="another base for all workloads")
    parser.add_argument("--json", type=Path, help="write all readings to this file")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke test: workload a, 4 steps, 1 round, built-in model",
    )
    args = parser.parse_args(argv)
    peers = {}
    if args.venvs:
        paths = {name: args.venvs.expanduser() / name / "bin/python" for name in tools.PEERS}
        peers = {name: str(place.absolute()) for name, place in paths.items() if place.is_file()}
    peers |= dict(pair.partition("=")[::2] for pair in args.peer)
    for name, python in peers.items():
        if name not in tools.PEERS or not Path(python).expanduser().is_file():
            parser.error(f"--peer {name}={python}: expected one of {', '.join(tools.PEERS)} and "
                         "the path of a Python.")  # fmt: skip
    if args.quick:
        from ftlevel.models.sources import builtin_path

        args.workloads, args.steps, args.rounds = ["a"], 4, 1
        args.model = args.model or builtin_path("tiny-llama")
    return args, {name: str(Path(path).expanduser()) for name, path in peers.items()}


def measure(args: argparse.Namespace, peers: dict[str, str], folder: Path) -> None:
    """Run the workloads, print their tables, and update the JSON file after each."""
    machine = describe_machine()
    results: list[dict[str, Any]] = []
    print(f"{machine}; alternating, medians.\n", flush=True)
    for letter in args.workloads:
        results.append(run_workload(letter, args, peers, folder / letter))
        print(workload_table(results[-1]) + "\n", flush=True)
        if args.json:
            content = {"machine": machine, "workloads": results}
            args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    args, peers = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="ftlevel-train-") as temporary:
        try:
            measure(args, peers, args.keep or Path(temporary))
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
