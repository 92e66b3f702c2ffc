#!/usr/bin/env python3
"""How far a merged run is from the run as trained: LoRA and QLoRA, on a .gguf and on its directory.

    python benchmarks/merge_fidelity.py RUNS --data data/docstring-summary
    python benchmarks/merge_fidelity.py RUNS --rows 12 --only lora-gguf

RUNS is a folder for the runs; those that are there already are not trained again. Each is merged
and measured by `ftlevel merge --json`; the last row is a LoRA run in float32, written in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from startup import MODEL, describe_machine

GGUF = MODEL.with_name(MODEL.name + ".gguf")
QLORA = ["--method", "qlora", "--double-quant", "--lora-r", "16", "--learning-rate", "1e-3"]
RUNS: dict[str, tuple[Path, list[str], list[str]]] = {
    "lora-directory": (MODEL, [], []),
    "lora-gguf": (GGUF, [], []),
    "qlora-directory": (MODEL, QLORA, []),
    "qlora-gguf": (GGUF, QLORA, []),
    "lora-float32": (MODEL, ["--dtype", "float32"], ["--dtype", "bfloat16"]),
}


def ftlevel(*arguments: str) -> str:
    """Run a command and return its output."""
    done = subprocess.run([sys.executable, "-m", "ftlevel", *arguments], capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return done.stdout


def train(name: str, folder: Path, data: Path) -> Path:
    """Return the run called `name`, trained if it is not there."""
    model, settings, _ = RUNS[name]
    if not (folder / name / "adapter").is_dir():
        ftlevel("train", "--model", str(model), "--dataset", str(data), "--task", "summarization",
                "--max-samples", "240", "--set", "data.max_eval_samples=48", "--max-length", "256",
                "--overlong", "truncate-prompt", "--max-steps", "30", "--batch-size", "4",
                "--set", "train.predict_with_generate=false", "--quiet",
                "--output-dir", str(folder / name), *settings)  # fmt: skip
    return folder / name


def row(name: str, run: Path, rows: int) -> str:
    """Return the line of a run that is merged."""
    with tempfile.TemporaryDirectory(prefix="ftlevel-merge-") as temporary:
        out = ["--out", f"{temporary}/merged", "--rows", str(rows), "--json"]
        found = json.loads(ftlevel("merge", str(run), *out, *RUNS[name][2]).splitlines()[-1])
    apart, exact, rounding = (found[k] for k in ("agreement", "before_rounding", "rounding"))
    trained = found["candidates"][found["onto"]]
    return (
        f"| {name} | {found['onto']} | {trained['kl']:.4f} | {trained['top1']:.1%} | "
        f"{trained['loss']:.4f} | {trained['loss_reference']:.4f} | "
        f"{exact['mean_difference'] / exact['scale']:.1e} | {rounding['kl']:.5f} | "
        f"{apart['targets']} |"
    )


def main() -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/docstring-summary"))
    parser.add_argument("--rows", type=int, default=48, help="validation rows to compare on")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    arguments.runs.mkdir(exist_ok=True)
    print(f"{describe_machine()}.\n")
    print("| run | onto | KL to the run as trained | same first choice | loss | as trained | "
          "before rounding, of the largest logit | KL of rounding alone | targets |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in arguments.only:
        print(row(name, train(name, arguments.runs, arguments.data), arguments.rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
