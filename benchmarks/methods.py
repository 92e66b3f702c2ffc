"""Train each method on real weights and real data, and print one table per task.

    python scripts/fetch_models.py
    python scripts/build_data.py wordnet-supersense factbook-ner factbook-qa docstring-summary
    python benchmarks/methods.py --out benchmarks/results/methods.json

Every run is an `ftlevel train` in a process of its own; its run directory stays in --runs, and one
that is whole is not trained again. The settings of a task are the same for all its methods but the
learning rate, which is stated: methods differ in what they need by a factor of a thousand. With
--defaults it is what ftlevel takes where none is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINILM = ".models/all-MiniLM-L6-v2"
SMOLLM2 = ".models/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Workload:
    """A task with the settings that all its methods share.

    Attributes:
        metrics: keys of a summary's metrics to show.
    """

    task: str
    model: str
    dataset: str
    flags: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A method as it is run, with the learning rate that it gets by default in the table."""

    name: str
    flags: tuple[str, ...]
    rate: float


WORKLOADS = {
    "wordnet-supersense": Workload(
        "text-classification", MINILM, "data/wordnet-supersense",
        ("--num-train-epochs", "4", "--batch-size", "16", "--set", "train.warmup_steps=0.1"),
        ("accuracy", "f1"),
    ),
    "factbook-ner": Workload(
        "token-classification", MINILM, "data/factbook-ner",
        ("--num-train-epochs", "2", "--batch-size", "16", "--set", "train.warmup_steps=0.1"),
        ("f1", "accuracy"),
    ),
    "factbook-qa": Workload(
        "question-answering", MINILM, "data/factbook-qa",
        ("--num-train-epochs", "1", "--batch-size", "16", "--set", "train.warmup_steps=0.1"),
        ("exact_match", "f1"),
    ),
    "docstring-summary": Workload(
        "summarization", SMOLLM2, "data/docstring-summary",
        (
            *("--max-samples", "160", "--batch-size", "8", "--num-train-epochs", "1"),
            *("--max-length", "256", "--overlong", "truncate-prompt"),
            *("--set", "data.max_eval_samples=32", "--set", "train.max_generate_samples=32"),
            *("--set", "train.max_new_tokens=32", "--set", "train.eval_on_start=true"),
        ),
        ("rougeL", "perplexity"),
    ),
}  # fmt: skip

ENCODER = (
    Entry("linear-probe", ("--method", "full", "--set", "method.freeze_base=true"), 1e-2),
    Entry("full", ("--method", "full"), 1e-4),
    Entry("lora", ("--method", "lora"), 1e-3),
    Entry("adapter, houlsby", ("--method", "adapter", "--set", "method.placement=houlsby"), 1e-3),
    Entry("adapter, pfeiffer", ("--method", "adapter", "--set", "method.placement=pfeiffer"), 1e-3),
    Entry("adapter, parallel", ("--method", "adapter", "--set", "method.placement=parallel"), 1e-3),
    Entry("prefix", ("--method", "prefix"), 1e-2),
)
MORE = (
    Entry("dora", ("--method", "lora", "--dora"), 1e-3),
    Entry("adalora", ("--method", "adalora"), 2e-3),
    Entry("ia3", ("--method", "ia3"), 1e-2),
    Entry("vera", ("--method", "vera"), 2e-2),
    Entry("oft", ("--method", "oft"), 1e-3),
    Entry("boft", ("--method", "boft"), 1e-3),
    Entry("loha", ("--method", "loha"), 1e-3),
    Entry("lokr", ("--method", "lokr"), 3e-3),
    Entry("ln-tuning", ("--method", "ln-tuning"), 3e-3),
    Entry("prompt", ("--method", "prompt"), 3e-2),
    Entry("p-tuning", ("--method", "p-tuning"), 5e-3),
)
DECODER = (
    Entry("lora", ("--method", "lora"), 5e-4),
    Entry("dora", ("--method", "lora", "--dora"), 5e-4),
    Entry("qlora, 4bit", ("--method", "qlora", "--quant", "4bit"), 5e-4),
    Entry("qlora, 8bit", ("--method", "qlora", "--quant", "8bit"), 5e-4),
    Entry("ia3", ("--method", "ia3"), 5e-3),
    Entry("adapter, houlsby", ("--method", "adapter"), 1e-3),
    Entry("prefix", ("--method", "prefix"), 1e-2),
)


def methods_of(workload: Workload) -> tuple[Entry, ...]:
    """Return the methods that are run on a workload: all of them where a run takes a minute."""
    if workload.model == SMOLLM2:
        return DECODER
    return ENCODER + (MORE if workload.task == "text-classification" else ())


def train(workload: Workload, entry: Entry, run: Path, *, defaults: bool) -> dict[str, Any]:
    """Return the summary of one run, which is trained if it is not there yet."""
    rate = () if defaults else ("--learning-rate", str(entry.rate))
    summary = run / "summary.json"
    if not summary.exists():
        command = [
            *(sys.executable, "-m", "ftlevel", "train", "--task", workload.task),
            *("--model", workload.model, "--dataset", workload.dataset, *workload.flags),
            *(*entry.flags, *rate),
            *("--output-dir", str(run), "--overwrite", "--quiet"),
        ]
        done = subprocess.run(command, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def row_of(entry: Entry, summary: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Return what the table shows of one run."""
    share = summary["trainable_parameters"] / summary["total_parameters"]
    return {
        "method": entry.name,
        "learning_rate": next(
            float(choice["value"])
            for choice in summary["choices"]
            if choice["name"] == "learning rate"
        ),
        "trainable": summary["trainable_parameters"],
        "share": share,
        "reload_difference": summary["proof"]["reload_difference"],
        **{name: summary["metrics"][name] for name in metrics},
    }


def show(name: str, rows: list[dict[str, Any]]) -> str:
    """Return a workload's rows as a Markdown table."""
    scores = [key for key in rows[0] if key not in _SHOWN]
    lines = [f"### {name}", "", f"| method | {' | '.join(scores)} | trained | learning rate |"]
    lines.append("|---" * (len(scores) + 3) + "|")
    lines += [
        f"| {row['method']} | {' | '.join(f'{row[key]:.3f}' for key in scores)} | "
        f"{row['trainable']:,} ({row['share']:.2%}) | {row['learning_rate']:g} |"
        for row in rows
    ]
    return "\n".join(lines)


_SHOWN = ("method", "learning_rate", "trainable", "share", "reload_difference")


def main() -> None:
    """Run what is asked for, write the figures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names with commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="run directories")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--methods", default="", help="names as in the table, with / between")
    parser.add_argument("--defaults", action="store_true", help="with the default rates")
    options = parser.parse_args()
    runs = options.runs / ("defaults" if options.defaults else "stated")
    wanted = options.methods.split("/") if options.methods else []
    tables = {}
    for name in options.workloads.split(","):
        workload = WORKLOADS[name]
        tables[name] = [
            row_of(entry, train(workload, entry, runs / name / slug(entry.name),
                                defaults=options.defaults), workload.metrics)
            for entry in methods_of(workload)
            if not wanted or entry.name in wanted
        ]  # fmt: skip
        print(show(name, tables[name]) + "\n", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(tables, indent=2) + "\n")


def slug(name: str) -> str:
    """Return a method's name as that of a directory."""
    return name.replace(", ", "-")


if __name__ == "__main__":
    main()
