"""Compare planned with measured memory of whole processes, on three real models.

    python benchmarks/plan.py [--models .models] [--only MiniLM]

Compares `ftlevel plan` with the peak resident memory of three steps of `ftlevel train`, on rows of
data/. The plan is not fitted to these measurements.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import markdown, run


def settings(models: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield name and flags of each setting."""
    smol, mini = str(models / "SmolLM2-135M-Instruct"), str(models / "all-MiniLM-L6-v2")
    summaries = ["--dataset", "data/docstring-summary", "--task", "summarization"]
    for name, flags in (
        ("built-in", []),
        ("MiniLM", ["--model", mini, "--dataset", "data/wordnet-supersense"]),
        ("SmolLM2", ["--model", smol, *summaries]),
        ("SmolLM2.gguf", ["--model", f"{smol}.gguf", *summaries]),
    ):
        for method in ("lora", "qlora", "adapter", "prefix", "full"):
            yield f"{name} {method}", [*flags, "--method", method]
    pairs = ["--map", "anchor=instruction+input", "--map", "positive=output"]
    pairs = ["--task", "embedding", "--dataset", "data/wordnet-define", *pairs]
    for model, dtype in itertools.product((mini, smol), ("float32", "bfloat16")):
        for rows in ("64", "256"):
            flags = ["--model", model, "--dtype", dtype, "--per-device-train-batch-size", rows]
            yield f"embedding {Path(model).name} {dtype} {rows}", [*flags, *pairs]


def measure(flags: list[str]) -> list[str]:
    """Return planned and measured MiB of a run, and their relative difference."""
    program, flags = [sys.executable, "-m", "ftlevel"], [*flags, "--max-steps", "3", "--json"]
    planned = json.loads(run([*program, "plan", *flags])[1])["process_bytes"] / 2**20
    with tempfile.TemporaryDirectory() as folder:
        measured = run([*program, "train", *flags, "--output-dir", f"{folder}/run"])[0].peak
    return [f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured - 1:+.1%}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--only", default="", help="settings whose names begin so")
    args = parser.parse_args()
    selected = [(n, f) for n, f in settings(args.models) if n.startswith(args.only)]
    rows = [[name, *measure(flags)] for name, flags in selected]
    print(markdown(("setting", "planned MiB", "measured MiB", "difference"), rows))


if __name__ == "__main__":
    main()
