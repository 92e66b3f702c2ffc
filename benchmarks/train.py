#!/usr/bin/env python3
"""`ftlevel train` beside a plain Trainer + PEFT script and other tools, on four workloads.

    python benchmarks/train.py                              all workloads, 20 steps, 3 rounds
    python benchmarks/train.py --workloads a b --steps 40 --peer trl=~/venvs/trl/bin/python
    python benchmarks/train.py --quick                      4 steps on the built-in model: a smoke

Every run is a process of its own, and in a round the tools take turns. A run is one epoch over
rows made for it, so that all see the same ones; the meter (training/meter) stamps the end of every
optimizer step, whatever the tool. Per run, from the end of the first step to that of the last:

    real tok/s        tokens of the rows, without padding, a second
    supervised tok/s  those among them that carry a label (rows, in classification)
    tok/cpu-s         real tokens a second of CPU: comparable on a busy machine, too
    MFU               4 · (weights of the blocks' linears · real tokens + weights of the head ·
                      supervised tokens) / seconds / peak, what a step cannot do without when the
                      base is frozen (forward, and the gradient of the activations; attention and
                      LoRA not counted); the peak is that of a matrix product, measured here

The table has the medians over the rounds, and ratios to the plain script. Peak memory is the
process's resident set, or what CUDA allocated. `first step s` is from the start of the process to
the first forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from startup import describe_machine
from training import tools, workloads
from training.workloads import Work

HERE = Path(__file__).resolve().parent
METER = HERE / "training" / "meter"
PEAK = """
import sys, time, torch
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
a = torch.randn(2048, 2048, device=device).to(dtype)
best = 1e9
for _ in range(12):
    began = time.perf_counter()
    for _ in range(4): b = a @ a
    b.sum().item()
    best = min(best, (time.perf_counter() - began) / 4)
print(2 * 2048**3 / best, torch.get_num_threads())
"""


@dataclass(frozen=True)
class Reading:
    """One run: seconds, CPU seconds and steps between the stamps, MiB, the mean loss."""

    seconds: float
    cpu_seconds: float
    steps: int
    first_step_s: float
    peak_mib: float
    loss: float | None


class FailedRunError(Exception):
    """A tool's process ended with an error; the message has its last words."""


def run_tool(tool: tools.Tool, python: str, work: Work, folder: Path) -> Reading:
    """Run one tool once in `folder` and read its stamps.

    Raises:
        UnsupportedError: the tool has no way to do the workload.
        FailedRunError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = tool.command(work, folder, python)
    stamps = folder / "stamps"
    stamps.unlink(missing_ok=True)
    paths = (
        [str(METER), *filter(None, [os.environ.get("PYTHONPATH")])]
        if not tool.peer
        else [str(METER)]
    )
    environment = {
        **os.environ, "TRAIN_METER": str(stamps), "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with (folder / "log").open("w", encoding="utf-8") as log:
        began = time.time()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    said = (folder / "log").read_text(encoding="utf-8", errors="replace")
    lines = stamps.read_text("utf-8").split("\n") if stamps.exists() else []
    events = [line.split() for line in lines if line and not line.startswith("cuda")]
    steps = [(float(wall), float(cpu)) for kind, wall, cpu in events if kind == "step"]
    if process.returncode != 0 or len(steps) < 2:
        last = " ".join(said.strip().splitlines()[-3:])[-400:]
        raise FailedRunError(f"ended with {process.returncode} after {len(steps)} steps: {last}")
    first = next(float(wall) for kind, wall, _ in events if kind == "forward")
    unit = 1 if sys.platform == "darwin" else 1024
    return Reading(
        steps[-1][0] - steps[0][0],
        steps[-1][1] - steps[0][1],
        len(steps),
        first - began,
        _cuda_mib(folder) or usage.ru_maxrss * unit / 2**20,
        mean_loss(folder, said),
    )


def _cuda_mib(folder: Path) -> float:
    """Return what CUDA allocated at most, where the meter wrote it."""
    lines = (folder / "stamps").read_text(encoding="utf-8").splitlines()
    return max((float(line.split()[1]) for line in lines if line.startswith("cuda")), default=0.0)


def mean_loss(folder: Path, said: str) -> float | None:
    """Return the mean of the losses of a run's steps, from its own records or its output."""
    metrics = folder / "run" / "metrics.jsonl"
    if metrics.is_file():
        records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
        found = [record["loss"] for record in records if "loss" in record]
    elif (folder / "plain.json").is_file():
        found = json.loads((folder / "plain.json").read_text(encoding="utf-8"))["losses"]
    else:
        texts = re.findall(r"(?<![a-z_])loss(?: train)?['\"]?: ?['\"]?([0-9.]+)", said)
        found = [float(text) for text in texts]
    return statistics.fmean(found) if found else None


def measure_peak(work: Work) -> tuple[float, int]:
    """Return FLOP/s of a matrix product on the workload's device, and torch's threads."""
    command = [sys.executable, "-c", PEAK, work.device, work.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    flops, threads = done.stdout.split()
    return float(flops), int(threads)


def run_workload(
    letter: str, arguments: argparse.Namespace, peers: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Run every tool on one workload, in turns, and return what the table and the file need."""
    quick = {"dtype": "float32"} if arguments.quick else {}
    folder.mkdir(parents=True)
    work = workloads.build(letter, folder, arguments.steps, arguments.model, **quick)
    readings: dict[str, list[Reading]] = {}
    refused: dict[str, str] = {}
    for number in range(arguments.rounds):
        for tool, python in tools.select(peers):
            if tool.name in refused or (arguments.only and tool.name not in arguments.only):
                continue
            place = folder / re.sub(r"\W+", "-", tool.name)
            try:
                reading = run_tool(tool, python, work, place)
            except (tools.UnsupportedError, FailedRunError) as error:
                refused[tool.name] = str(error)
                print(f"{work.name}: {tool.name}: {error}", file=sys.stderr)
                continue
            readings.setdefault(tool.name, []).append(reading)
            print(
                f"{work.name}: round {number + 1}: {tool.name}: {reading.seconds:.1f} s, "
                f"loss {reading.loss or float('nan'):.4f}",
                file=sys.stderr,
            )
    facts = json.loads((folder / "plain" / "plain.json").read_text(encoding="utf-8"))
    peak, threads = measure_peak(work)
    rows = summarize(work, readings, facts, peak)
    return {
        "work": asdict(work), "facts": {k: v for k, v in facts.items() if k != "losses"},
        "peak_flops": peak, "threads": threads, "tools": rows, "refused": refused,
        "readings": {name: [asdict(r) for r in taken] for name, taken in readings.items()},
    }  # fmt: skip


def summarize(
    work: Work, readings: dict[str, list[Reading]], facts: dict[str, Any], peak: float
) -> dict[str, dict[str, float]]:
    """Return the medians of each tool.

    The tokens between the stamps are all but those of the first step; a tool that packs has other
    steps, and is counted all but one of them.
    """
    rows = {}
    share = facts["supervised"] / facts["tokens"]
    for name, taken in readings.items():
        same = taken[0].steps == work.steps
        first = facts["first_step_tokens"] if same else facts["tokens"] / taken[0].steps
        tokens = facts["tokens"] - first
        needed = facts["block_parameters"] + facts["head_parameters"] * share
        rows[name] = {
            "tokens_per_s": statistics.median(tokens / r.seconds for r in taken),
            "tokens_per_cpu_s": statistics.median(tokens / r.cpu_seconds for r in taken),
            "supervised_per_s": statistics.median(tokens * share / r.seconds for r in taken),
            "mfu": statistics.median(4 * needed * tokens / r.seconds / peak for r in taken),
            "peak_mib": statistics.median(r.peak_mib for r in taken),
            "first_step_s": statistics.median(r.first_step_s for r in taken),
            "loss": statistics.median(r.loss or float("nan") for r in taken),
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of one workload."""
    work, rows = result["work"], result["tools"]
    plain = rows.get("plain")
    lines = [
        f"**{work['name']}** ({Path(work['model']).name}, {work['dtype']}, {work['batch']} × "
        f"{work['accumulate']} rows, {work['steps']} steps, {result['facts']['tokens']:,} tokens, "
        f"{result['threads']} threads, peak {result['peak_flops'] / 1e9:.0f} GFLOP/s)",
        "",
        "| | real tok/s | × plain | tok/cpu-s | × plain | supervised/s | MFU | peak MiB "
        "| first step s | mean loss |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        wall, cpu = (
            f"{row[key] / plain[key]:.2f}" if plain else "" for key in
            ("tokens_per_s", "tokens_per_cpu_s")
        )  # fmt: skip
        lines.append(
            f"| {name} | {row['tokens_per_s']:.0f} | {wall} "
            f"| {row['tokens_per_cpu_s']:.0f} | {cpu} | {row['supervised_per_s']:.0f} "
            f"| {row['mfu']:.2f} | {row['peak_mib']:,.0f} "
            f"| {row['first_step_s']:.1f} | {row['loss']:.4f} |"
        )
    lines += [f"| {name} | refused: {why} |" for name, why in result["refused"].items()]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse the command line; return the peers' pythons, too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices="abcd", default=list("abcd"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON",
        help=f"a tool and the python of its environment: {', '.join(tools.PEERS)}",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="TOOL", help="run these tools only")
    parser.add_argument("--model", type=Path, help="another base for all workloads")
    parser.add_argument("--json", type=Path, help="write everything that was read to this file")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke: workload a, 4 steps, 1 round, built-in model"
    )
    arguments = parser.parse_args(argv)
    peers = dict(pair.partition("=")[::2] for pair in arguments.peer)
    for name, python in peers.items():
        if name not in tools.PEERS or not Path(python).expanduser().is_file():
            parser.error(f"--peer {name}={python}: expected one of {', '.join(tools.PEERS)} and "
                         "the path of a python.")  # fmt: skip
    if arguments.quick:
        from ftlevel.builtin import model_path

        arguments.workloads, arguments.steps, arguments.rounds = ["a"], 4, 1
        arguments.model = arguments.model or model_path("tiny-llama")
    return arguments, {name: str(Path(path).expanduser()) for name, path in peers.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    arguments, peers = parse_arguments(argv)
    machine = describe_machine()
    print(f"{machine}; {arguments.rounds} rounds in turns, medians.\n", flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="ftlevel-train-") as temporary:
        for letter in arguments.workloads:
            try:
                folder = Path(temporary) / letter
                results.append(run_workload(letter, arguments, peers, folder))
            except FileNotFoundError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(table(results[-1]) + "\n", flush=True)
    if arguments.json:
        whole = {"machine": machine, "workloads": results}
        arguments.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
