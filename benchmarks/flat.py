#!/usr/bin/env python3
"""Does `ftlevel train` stay as fast with more and with longer rows, and what memory does it take?

    python benchmarks/flat.py                                 three tables, about ten minutes
    python benchmarks/flat.py --rows 512 10000 --lengths 512 1024 --steps 3 --rounds 1
    python benchmarks/flat.py --only lengths memory

Three tables, of the model of `benchmarks/train.py`'s workload (a), LoRA r 8:

    rows      tokens a second with 512, 10,000 and 100,000 rows of data, 16 rows a step: what could
              grow is reading, encoding, the order and the checks; so the time to the first step and
              the memory stand beside it
    lengths   tokens a second at a max length of 512 to 4,096, the rows being documented functions
              joined to nearly that length, 4,096 tokens a step
    memory    private memory of steps of one row of each length, and the straight line through it;
              beside it that of the whole run, with what prepares, saves and checks

Readings are those of the meter (training/meter), from the end of the first step to the end of the
last; medians over the rounds. Private memory is resident memory that is not of a file, at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from startup import describe_machine
from training import workloads
from training.runs import FailedRunError, Reading, run_metered

from ftlevel.data.sources.docstrings import read_docstrings

TOKENS_PER_STEP = 4096
Messages = list[dict[str, str]]


def number_rows(count: int) -> Iterator[Messages]:
    """Give `count` conversations, the documented functions in turns, none like another."""
    functions = itertools.cycle(read_docstrings("generation", "train"))
    for number, row in zip(range(count), functions, strict=False):
        yield [
            {"role": "user", "content": f"{number}. {row['prompt']}"},
            {"role": "assistant", "content": row["completion"]},
        ]


def join_rows(count: int, length: int, tokenizer: Any) -> Iterator[Messages]:
    """Give `count` conversations of several turns, of nearly `length` tokens and never more."""
    functions = itertools.cycle(read_docstrings("generation", "train"))
    for _ in range(count):
        turns: Messages = []
        misses = 0
        while misses < 8:  # what follows may be shorter
            row = next(functions)
            more = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            whole = tokenizer.apply_chat_template([*turns, *more], tokenize=True, return_dict=False)
            if len(whole) <= length:
                turns += more
            else:
                misses += 1
        yield turns


def train(
    folder: Path, model: Path, rows: Iterator[Messages], length: int, batch: int, steps: int
) -> Reading:
    """Write the rows, train on them with `ftlevel train`, and return the reading."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    if not file.exists():
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"messages": row}) + "\n" for row in rows)
    command = [
        sys.executable, "-m", "ftlevel", "train", "--quiet", "--method", "lora", "--model",
        str(model), "--dataset", str(file), "--task", "text-generation", "--max-length",
        str(length), "--overlong", "drop", "--dtype", "bfloat16", "--device", "cpu", "--no-cache",
        "--max-steps", str(steps), "--per-device-train-batch-size", str(batch),
        "--learning-rate", "2e-4", "--lr-scheduler-type", "constant", "--logging-steps", "1",
        "--seed", "42", "--output-dir", str(folder / "run"), "--overwrite",
    ]  # fmt: skip
    reading = run_metered(command, folder)
    print(
        f"{folder.name}: {reading.tokens / reading.seconds:.0f} tokens/s, "
        f"{reading.private_training_mib:,.0f} MiB training, {reading.private_mib:,.0f} in all",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return reading


def median(readings: Sequence[Reading]) -> dict[str, float]:
    """Return the medians of every field of several runs, and of the speeds."""
    rows = [
        {**asdict(r), "speed": r.tokens / r.seconds, "cpu_speed": r.tokens / r.cpu_seconds}
        for r in readings
    ]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Return intercept and slope by least squares, and the largest distance from the line."""
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
    start = y - slope * x
    return start, slope, max(abs(b - start - slope * a) for a, b in zip(xs, ys, strict=True))


def speed_table(label: str, rows: dict[int, dict[str, float]]) -> str:
    """Return the Markdown of the tables `rows` and `lengths`."""
    first = next(iter(rows.values()))
    lines = [
        f"| {label} | real tok/s | × first | tok/cpu-s | × first | mean row, tokens "
        "| first step s | private MiB, training | in all |",
        "|--:|" + "--:|" * 8,
    ]
    for value, row in rows.items():
        lines.append(
            f"| {value:,} | {row['speed']:.0f} | {row['speed'] / first['speed']:.2f} "
            f"| {row['cpu_speed']:.0f} | {row['cpu_speed'] / first['cpu_speed']:.2f} "
            f"| {row['all_tokens'] / row['steps'] / row['batch']:.0f} "
            f"| {row['first_step_s']:.1f} | {row['private_training_mib']:,.0f} "
            f"| {row['private_mib']:,.0f} |"
        )
    return "\n".join(lines)


def memory_table(rows: dict[int, dict[str, float]]) -> str:
    """Return the Markdown of the table `memory`, and the line through it."""
    lengths = [row["all_tokens"] / row["steps"] for row in rows.values()]
    memory = [row["private_training_mib"] for row in rows.values()]
    whole = [row["private_mib"] for row in rows.values()]
    lines = [
        "| max length | tokens of a row | private MiB, training | the line | in all |",
        "|--:|--:|--:|--:|--:|",
    ]
    start, slope, off = fit_line(lengths, memory) if len(rows) > 1 else (memory[0], 0.0, 0.0)
    for value, length, mib, most in zip(rows, lengths, memory, whole, strict=True):
        fitted = start + slope * length
        lines.append(f"| {value:,} | {length:,.0f} | {mib:,.0f} | {fitted:,.0f} | {most:,.0f} |")
    lines += ["", f"The line: {start:,.0f} MiB + {slope:.3f} MiB a token; no point is further from "
              f"it than {off:,.0f} MiB ({off / max(memory):.1%} of the most)."]  # fmt: skip
    return "\n".join(lines)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[int, Any]]:
    """Run everything in turns, and return the readings of each table."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    taken: dict[str, dict[int, list[Any]]] = {}
    steps = arguments.steps
    for _ in range(arguments.rounds):
        for kind in arguments.only:
            for value in arguments.rows if kind == "rows" else arguments.lengths:
                length = 512 if kind == "rows" else value
                batch = {"rows": 16, "lengths": max(1, TOKENS_PER_STEP // value), "memory": 1}[kind]
                rows = (
                    number_rows(value)
                    if kind == "rows"
                    else join_rows(batch * steps, length, tokenizer)
                )
                place = folder / f"{kind}-{value}"
                reading = train(place, arguments.model, rows, length, batch, steps)
                found = taken.setdefault(kind, {}).setdefault(value, [])
                found.append((reading, batch))
    return {
        kind: {
            value: {**median([reading for reading, _ in found]), "batch": found[0][1]}
            for value, found in values.items()
        }
        for kind, values in taken.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=workloads.SMOLLM2)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 10_000, 100_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=5, help="of each run, the first not counted")
    parser.add_argument("--rounds", type=int, default=1)
    tables = ["rows", "lengths", "memory"]
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--json", type=Path, help="write everything that was read to this file")
    arguments = parser.parse_args(argv)
    if not arguments.model.is_dir():
        parser.error(f"{arguments.model} is not there. Run: python scripts/fetch_models.py")
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="ftlevel-flat-") as temporary:
        try:
            results = measure(arguments, Path(temporary))
        except FailedRunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"{machine}; {arguments.steps} steps, {arguments.rounds} rounds.")
    for kind, rows in results.items():
        labels = {"rows": "rows of data", "lengths": "max length"}
        print("\n" + (memory_table(rows) if kind == "memory" else speed_table(labels[kind], rows)))
    if arguments.json:
        whole = {"machine": machine, "tables": results}
        arguments.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
