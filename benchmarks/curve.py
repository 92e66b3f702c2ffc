#!/usr/bin/env python3
"""Does a run with everything on learn what a plain one learns? Two runs on the same rows, compared.

    python benchmarks/curve.py                            200 steps each, writes docs/curve.svg
    python benchmarks/curve.py --steps 5 --svg curve.svg
    python benchmarks/curve.py --runs FAST PLAIN          compare two run directories that are there

`ftlevel train` on `data/docstring-summary` with SmolLM2-135M-Instruct, LoRA r 8, batch 4 × 2, once
as it comes and once with `--no-fast`; the losses are those of their metrics.jsonl. Single steps
differ by what bfloat16 rounds, so the means are compared, of all steps and of the last 50.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from startup import describe_machine
from training import workloads

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 10  # steps of the moving mean that is drawn over the single steps
SIZE = (720, 300)
MARGIN = {"left": 52, "right": 14, "top": 30, "bottom": 40}
COLOURS = {"plain": "#9a6700", "fast": "#0969da"}


def train(arguments: argparse.Namespace, name: str, folder: Path) -> Path:
    """Train once, `name` being fast or plain, and return the run directory."""
    command = [
        sys.executable, "-m", "ftlevel", "train", "--quiet", "--method", "lora",
        "--model", str(arguments.model), "--dataset", str(arguments.dataset),
        "--task", "summarization", "--lora-r", "8", "--max-length", "512", "--overlong", "drop",
        "--max-steps", str(arguments.steps), "--per-device-train-batch-size", "4",
        "--gradient-accumulation-steps", "2", "--logging-steps", "1", "--seed", "42",
        "--dtype", arguments.dtype, "--set", "data.max_eval_samples=1",
        "--output-dir", str(folder / name), "--overwrite",
        *(["--no-fast"] if name == "plain" else []),
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    print(f"{name}: {time.perf_counter() - began:.0f} s in all", file=sys.stderr, flush=True)
    return folder / name


def read_losses(run: Path) -> list[float]:
    """Return the loss of every optimizer step of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def compare(fast: Sequence[float], plain: Sequence[float]) -> str:
    """Return the Markdown of how far the losses of two runs are from each other."""
    lines = ["| steps | plain | fast | difference |", "|---|--:|--:|--:|"]
    for label, last in (("all", len(plain)), ("the last 50", 50), ("the last 10", 10)):
        if last <= len(plain):
            ours, theirs = statistics.fmean(fast[-last:]), statistics.fmean(plain[-last:])
            lines.append(f"| {label} | {theirs:.5f} | {ours:.5f} | {ours / theirs - 1:+.3%} |")
    apart = [abs(a / b - 1) for a, b in zip(fast, plain, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    lines += ["", f"The largest difference of one step is {apart[worst]:.2%}, at step {worst + 1} "
              f"of {len(plain)}; their median is {statistics.median(apart):.3%}."]  # fmt: skip
    return "\n".join(lines)


def draw(curves: dict[str, Sequence[float]]) -> str:
    """Return an SVG of the losses against the steps: single steps pale, moving means over them."""
    width, height = SIZE
    across = width - MARGIN["left"] - MARGIN["right"]
    down = height - MARGIN["top"] - MARGIN["bottom"]
    steps = max(map(len, curves.values()))
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    room = (high - low or 1.0) * 0.04
    low, high = low - room, high + room

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN["left"] + across * (step - 1) / max(steps - 1, 1)
        return x, MARGIN["top"] + down * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" role="img" '
        'aria-label="Training loss of a fast and a plain run against the steps">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for tick in _ticks(low, high, 5):
        y = place(1, tick)[1]
        parts.append(f'<path d="M{MARGIN["left"]} {y:.1f}h{across}" stroke="#d0d7de"/>')
        parts.append(
            f'<text x="{MARGIN["left"] - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(1, steps, 8):
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{MARGIN["left"] + across / 2:.0f}" y="{height - 4}" '
                 'text-anchor="middle">optimizer step</text>')  # fmt: skip
    for number, (name, losses) in enumerate(curves.items()):
        colour, dash = COLOURS[name], ' stroke-dasharray="5 3"' if number else ""
        for values, opacity, thickness in ((losses, 0.25, 1), (_moving_mean(losses), 1, 2)):
            points = " ".join("{:.1f},{:.1f}".format(*place(s, v)) for s, v in enumerate(values, 1))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                         f'stroke-opacity="{opacity}" stroke-width="{thickness}"'
                         f'{dash if thickness > 1 else ""}/>')  # fmt: skip
        x = MARGIN["left"] + 150 * number
        parts.append(f'<path d="M{x} 15h26" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{x + 32}" y="19">{name}, mean of {WINDOW}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _moving_mean(values: Sequence[float]) -> list[float]:
    return [
        statistics.fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)
    ]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between `low` and `high`, `most` of them or fewer."""
    for step in (s * 10.0**power for power in range(-4, 6) for s in (1, 2, 5)):
        if (high - low) / step <= most - 1:
            first = -int(-low // step)
            return [
                round(step * n, 6)
                for n in range(first, first + most)
                if low <= step * n <= high + 1e-9
            ]
    return [low]


def main(argv: Sequence[str] | None = None) -> int:
    """Train twice, print Markdown, write the picture, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", type=Path, default=workloads.SMOLLM2)
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "docstring-summary")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "curve.svg")
    parser.add_argument("--runs", type=Path, nargs=2, metavar=("FAST", "PLAIN"))
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "curve")
    arguments = parser.parse_args(argv)
    if not arguments.runs:
        for place, script in ((arguments.model, "fetch_models.py"),
                              (arguments.dataset, "build_data.py docstring-summary")):  # fmt: skip
            if not place.exists():
                parser.error(f"{place} is not there. Run: python scripts/{script}")
        try:
            arguments.runs = [train(arguments, n, arguments.output_dir) for n in ("fast", "plain")]
        except subprocess.CalledProcessError as error:
            print(f"error: ftlevel train ended with {error.returncode}", file=sys.stderr)
            return 1
    fast, plain = map(read_losses, arguments.runs)
    print(f"{describe_machine()}; {len(plain)} steps.\n\n{compare(fast, plain)}")
    arguments.svg.write_text(draw({"plain": plain, "fast": fast}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
