"""Compare DPO steps with TRL on the same model, pairs, precision and batch.

    python benchmarks/preference.py --model .models/SmolLM2-135M-Instruct \
        --data data/docstring-pairs --peer FOLDER
    python benchmarks/preference.py --model .models/SmolLM2-135M-Instruct \
        --data data/docstring-summary --turns 5 --peer FOLDER     # talks with long prompts

Each side runs in a process of its own: ftlevel; TRL with the reference in the step, as it is
shipped; and TRL with the reference computed before (`precompute_ref_log_probs`). TRL is taken from
`--peer`, a folder that `pip install --no-deps --target FOLDER trl==1.16.0` made. LoRA r 8 on all
linear layers, no dropout, no checkpointing (TRL's default has it, and would be slower). Processor
seconds of all threads, without the first step; peak memory with the libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import alternate, run_side, step_clock

SIDES = ("ftlevel", "trl", "trl-precomputed")


def main() -> None:
    """Run all sides by turns and print a table, or one side and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with train.jsonl")
    parser.add_argument("--peer", default="", help="folder in which TRL is")
    parser.add_argument(
        "--turns", type=int, default=0,
        help="talks of so many questions and answers before the last; of docstring-summary",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.side:
        measure = _ftlevel if told.side == "ftlevel" else _trl
        print(json.dumps(measure(told)))
        return
    paths = {side: "" if side == "ftlevel" else told.peer for side in told.sides.split(",")}
    cases = {side: partial(run_side, "--side", side, path) for side, path in paths.items()}
    found = alternate(cases, told.rounds, warm_ups=0)
    _print(found, told)


def _print(found: dict[str, list[dict[str, float]]], told: argparse.Namespace) -> None:
    per_pair = {side: [run["cpu_s"] for run in runs] for side, runs in found.items()}
    ours = statistics.median(per_pair["ftlevel"]) if "ftlevel" in per_pair else None
    print(f"{told.dtype}, batch {told.batch}, {told.steps - 1} steps, {told.rounds} rounds")
    for side, runs in found.items():
        middle = statistics.median(per_pair[side])
        ratio = f"{middle / ours:5.2f} x ftlevel" if ours else ""
        memory = statistics.median(run["peak_mib"] for run in runs)
        fill = statistics.median(run["reference_cpu_s"] for run in runs)
        spread = ", ".join(f"{value:.2f}" for value in per_pair[side])
        print(
            f"{side:16} {middle:6.2f} cpu s/pair ({spread}) {ratio}; reference before the first "
            f"step {fill:5.2f} cpu s/pair; peak {memory:,.0f} MiB; first loss {runs[0]['loss']:.4f}"
        )


def _figures(ends: list[float], pairs: int, reference: float, loss: float) -> dict[str, float]:
    seconds = statistics.median(after - before for before, after in pairwise(ends)) / pairs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": seconds, "reference_cpu_s": reference, "peak_mib": peak, "loss": loss}


def _rows(told: argparse.Namespace) -> list[dict[str, Any]]:
    """Return pairs as talks; with --turns a prompt has so many questions and answers before it."""
    lines = (Path(told.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows, count = list(map(json.loads, lines)), told.batch * told.steps
    if not told.turns:
        return [
            {"prompt": [_turn("user", row["prompt"])],
             "chosen": [_turn("assistant", row["chosen"])],
             "rejected": [_turn("assistant", row["rejected"])]}
            for row in rows[:count]
        ]  # fmt: skip
    talks = []
    for n in range(count):
        own = [rows[(n * (told.turns + 1) + at) % len(rows)] for at in range(told.turns + 1)]
        turns = [
            _turn(role, row[key])
            for row in own
            for role, key in (("user", "document"), ("assistant", "summary"))
        ]
        talks.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": turns[1:2]})
    return talks


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ftlevel(told: argparse.Namespace) -> dict[str, float]:
    import tempfile

    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig
    from ftlevel.events import NullListener

    ends, rows, marks = list[float](), _rows(told), dict[str, float]()

    class Stages(NullListener):
        def stage(self, name: str) -> None:
            marks.setdefault("end" if "reference" in marks else name, time.process_time())
            if name == "computing reference log-probabilities":
                marks["reference"] = time.process_time()

        def choices(self, title: str, choices: Any) -> None:  # noqa: ARG002
            if title == "reference":
                marks["end"] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate({
            "task": "preference", "preference": {"loss": "dpo"},
            "model": {"name_or_path": told.model, "dtype": told.dtype, "device": "cpu"},
            "data": {"cache": False}, "speed": {"verify": False},
            "train": {"max_steps": told.steps, "per_device_train_batch_size": told.batch,
                      "learning_rate": 1e-4, "logging_steps": 1},
            "output": {"dir": f"{folder}/run"},
        })  # fmt: skip
        result = train(config, rows, callbacks=[step_clock(ends)], listener=Stages())
    reference = (marks["end"] - marks["reference"]) / len(rows)
    return _figures(ends, told.batch, reference, result.summary["reference"]["first_loss"])


def _trl(told: argparse.Namespace) -> dict[str, float]:
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    ends, rows = list[float](), _rows(told)
    model = AutoModelForCausalLM.from_pretrained(told.model, dtype=getattr(torch, told.dtype))
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=folder, max_steps=told.steps, per_device_train_batch_size=told.batch,
                learning_rate=1e-4, logging_steps=1, report_to="none", use_cpu=True,
                bf16=told.dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True,
                precompute_ref_log_probs=told.side == "trl-precomputed", save_strategy="no",
                max_length=None,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(told.model),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[step_clock(ends)],
        )  # fmt: skip
        built = time.process_time() - before
        trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    precomputed = built / len(rows) if told.side == "trl-precomputed" else 0.0
    return _figures(ends, told.batch, precomputed, loss)


if __name__ == "__main__":
    main()
