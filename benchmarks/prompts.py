#!/usr/bin/env python3
"""What sharing the prompt that all rows begin with gives, against its length.

    python benchmarks/prompts.py
    python benchmarks/prompts.py --prompts 1500 --rows-a-step 64 --rounds 1

Rows of the model of `benchmarks/train.py`'s workload (a), LoRA r 8: one system prompt of each
length, and the documented functions' texts with their first lines as answers. Each length is
trained in three ways, in turns:

    as it is          `ftlevel train`
    one at a time     speed.parallel_workers=1: each micro-batch computes the prompt once
    not shared        speed.share_prefixes=never: each row computes it

Readings are those of the meter (training/meter), from the end of the first step to the end of the
last; medians over the rounds. Private memory is resident memory that is not of a file, at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from startup import describe_machine
from training import workloads
from training.runs import FailedRunError, Reading, run_metered

from ftlevel.data.sources.docstrings import read_docstrings

WAYS = {
    "as it is": [],
    "one at a time": ["--set", "speed.parallel_workers=1"],
    "not shared": ["--set", "speed.share_prefixes=never"],
}
LONGEST_TEXT = 300
"""Characters of a row's own text."""

OWN = 250
"""Tokens of a row beside the prompt, at most."""


def write_rows(file: Path, count: int, prompt: int, tokenizer: Any) -> None:
    """Write `count` conversations behind one system prompt of `prompt` tokens."""
    rows = list(islice(read_docstrings("summarization", "train"), 200 + count))
    text = "\n".join(row["document"] for row in rows[:200])
    system = tokenizer.decode(tokenizer(text)["input_ids"][:prompt])
    with file.open("w", encoding="utf-8") as out:
        for row in rows[200:]:
            turns = [
                {"role": "system", "content": system},
                {"role": "user", "content": row["document"][:LONGEST_TEXT]},
                {"role": "assistant", "content": row["summary"]},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def train(
    folder: Path, rows: Path, prompt: int, way: str, arguments: argparse.Namespace
) -> Reading:
    """Train on `rows` and return the reading."""
    folder.mkdir(parents=True)
    command = [
        sys.executable, "-m", "ftlevel", "train", "--quiet", "--method", "lora", "--model",
        str(arguments.model), "--dataset", str(rows), "--task", "text-generation",
        "--max-length", str(prompt + OWN), "--overlong", "drop", "--dtype", "bfloat16",
        "--device", "cpu", "--no-cache", "--max-steps", str(arguments.steps),
        "--per-device-train-batch-size", "1",
        "--gradient-accumulation-steps", str(arguments.rows_a_step), "--seed", "42",
        "--output-dir", str(folder / "run"), *WAYS[way],
    ]  # fmt: skip
    return run_metered(command, folder)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[tuple[int, str], list[Reading]]:
    """Run everything in turns, and return the readings of each length and way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    found: dict[tuple[int, str], list[Reading]] = {}
    for turn in range(arguments.rounds):
        for prompt in arguments.prompts:
            rows = folder / f"{prompt}.jsonl"
            write_rows(rows, arguments.rows_a_step * arguments.steps, prompt, tokenizer)
            for way in WAYS:
                place = folder / f"{turn}-{prompt}-{way.replace(' ', '-')}"
                reading = train(place, rows, prompt, way, arguments)
                print(f"{prompt} tokens, {way}: {reading.tokens / reading.seconds:,.0f} tokens/s",
                      file=sys.stderr, flush=True)  # fmt: skip
                found.setdefault((prompt, way), []).append(reading)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=workloads.SMOLLM2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[300, 1500, 3000])
    parser.add_argument("--rows-a-step", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of each run, the first not counted")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args(argv)
    if not arguments.model.is_dir():
        parser.error(f"{arguments.model} is not there. Run: python scripts/fetch_models.py")
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="ftlevel-prompts-") as temporary:
        try:
            found = measure(arguments, Path(temporary))
        except FailedRunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"{machine}; {arguments.rows_a_step} rows a step, {arguments.rounds} rounds.\n")
    print("| prompt, tokens | | real tok/s | × not shared | private MiB | mean loss |")
    print("|--:|---|--:|--:|--:|--:|")
    for (prompt, way), readings in found.items():
        speed, base = (
            statistics.median(r.tokens / r.seconds for r in found[prompt, name])
            for name in (way, "not shared")
        )
        memory = statistics.median(r.private_mib for r in readings)
        print(f"| {prompt:,} | {way} | {speed:,.0f} | {speed / base:.2f} | {memory:,.0f} "
              f"| {readings[0].loss:.4f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
