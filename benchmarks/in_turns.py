"""What a step of the working tree takes beside one of another revision, step by step in turns.

    python benchmarks/in_turns.py HEAD~20                        workload a, 40 steps
    python benchmarks/in_turns.py v0.1.0 --workloads a b c d --steps 60

Two processes train on the same rows, and while one makes a step the other one waits. Step for step
their times are compared, so what the machine does meanwhile, which changes runs of a minute by a
tenth, meets both alike. Per workload: the median of (now / before) over the steps without the first
and the last, of seconds and of processor seconds, with an interval that holds it in 95 of 100 cases
(order statistics of the ratios); and whether the losses are the same. `train.py` has the workloads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from startup import describe_machine
from training import tools, workloads
from training.runs import METER, Reading, run_metered
from training.workloads import ROOT

SIDES = ("before", "now")


def middle(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the bounds of an interval that holds it in 95 of 100 cases.

    The bounds are order statistics: ranks n/2 -+ 1.96 sqrt(n)/2 (the normal approximation of the
    binomial), so nothing is assumed of how the ratios are spread.
    """
    ordered, count = sorted(ratios), len(ratios)
    reach = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    half = count // 2
    median = ordered[half] if count % 2 else (ordered[half - 1] + ordered[half]) / 2
    return median, ordered[low], ordered[high]


def train_in_turns(
    work: workloads.Work, folder: Path, trees: dict[str, Path]
) -> dict[str, tuple[Reading, list[dict[str, Any]]]]:
    """Train once in each tree, a step here and a step there, and return readings and turns.

    Raises:
        FailedRunError: one of them failed; the other has gone on alone.
    """
    pipes = {side: folder / f"turn-of-{side}" for side in SIDES}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    ends = [os.open(pipe, os.O_RDWR) for pipe in pipes.values()]  # what is written stays in them
    os.write(ends[0], b".")

    def train(side: str) -> tuple[Reading, list[dict[str, Any]]]:
        other = next(name for name in SIDES if name != side)
        place = folder / side
        environment = {
            "TRAIN_TURNS": f"{pipes[side]}:{pipes[other]}",
            "PYTHONPATH": f"{METER}{os.pathsep}{trees[side] / 'src'}",
        }
        try:
            command = tools.ftlevel(work, place, sys.executable)
            reading = run_metered(command, place, environment)
        finally:
            os.write(ends[SIDES.index(other)], b"." * 4096)
        lines = map(json.loads, (place / "events").read_text("utf-8").splitlines())
        return reading, [event for event in lines if event["kind"] == "turn"]

    try:
        with ThreadPoolExecutor(2) as both:
            return dict(zip(SIDES, both.map(train, SIDES), strict=True))
    finally:
        for end in ends:
            os.close(end)


def compare(letter: str, steps: int, folder: Path, trees: dict[str, Path]) -> str:
    """Return the row of one workload."""
    folder.mkdir()
    work = workloads.build(letter, folder, steps)
    found = train_in_turns(work, folder, trees)
    before, now = (found[side][1] for side in SIDES)
    pairs = list(zip(before, now, strict=True))[1:-1]
    cells = [work.name, str(len(pairs))]
    for key in ("seconds", "cpu_seconds"):
        median, low, high = middle([new[key] / old[key] for old, new in pairs])
        cells.append(f"{median:.3f} ({low:.3f} to {high:.3f})")
    old_loss, new_loss = (found[side][0].loss for side in SIDES)
    cells.append("the same" if old_loss == new_loss else f"{old_loss:.4f}, {new_loss:.4f}")
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("before", metavar="REVISION", help="what git calls it")
    parser.add_argument("--workloads", nargs="+", choices="abcd", default=["a"])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    arguments = parser.parse_args(argv)
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="ftlevel-turns-") as temporary:
        folder = Path(temporary)
        trees = {"before": folder / "tree", "now": ROOT}
        add = ["worktree", "add", "--quiet", "--detach", str(trees["before"]), arguments.before]
        subprocess.run([*git, *add], check=True)
        try:
            print(f"{describe_machine()}; now / before, in turns.\n")
            print("| workload | steps | seconds | processor seconds | mean loss |")
            print("|---|--:|--:|--:|--:|", flush=True)
            for letter in arguments.workloads:
                print(compare(letter, arguments.steps, folder / letter, trees), flush=True)
        finally:
            subprocess.run(
                [*git, "worktree", "remove", "--force", str(trees["before"])], check=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
