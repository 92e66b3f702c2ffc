"""Compare DPO steps with TRL on the same model, pairs, precision and batch.

    python benchmarks/preference.py --model .models/SmolLM2-135M-Instruct \
        --data data/docstring-pairs --peer FOLDER
    python benchmarks/preference.py --model .models/SmolLM2-135M-Instruct \
        --data data/docstring-summary --turns 5 --peer FOLDER     # conversations with long prompts

Each side runs in its own process: ftlevel; TRL with the reference in the step, as shipped; and TRL
with a precomputed reference (`precompute_ref_log_probs`). `--peer` is the directory of TRL, created
by `pip install --no-deps --target FOLDER trl==1.16.0`. LoRA r 8 on all linear layers, no dropout,
no checkpointing (TRL's default, which would be slower). CPU seconds of all threads, without the
first step; peak memory including libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import compare_sides, markdown, own_peak_mib, step_clock


def main() -> None:
    """Measure the sides and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with train.jsonl")
    parser.add_argument(
        "--turns", type=int, default=0,
        help="earlier turns of each conversation; for docstring-summary",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    measures = {"ftlevel": _ftlevel, "trl": _trl, "trl-precomputed": _trl}
    args, results = compare_sides(parser, measures)
    print(f"{args.dtype}, batch {args.batch}, {args.steps - 1} steps, {args.rounds} rounds")
    head = ("side", "CPU s per pair", "reference, once", "peak MiB", "first loss")
    rows = []
    for side, runs in results.items():
        seconds, reference, peak, loss = map(statistics.median, zip(*runs, strict=True))
        figures = (f"{seconds:.2f}", f"{reference:.2f}", f"{peak:,.0f}", f"{loss:.4f}")
        rows.append([side, *figures])
    print(markdown(head, rows))


def _figures(ends: list[float], pairs: int, reference: float, loss: float) -> list[float]:
    """Return CPU seconds per pair of a step and of the reference, peak MiB, and the first loss."""
    seconds = statistics.median(after - before for before, after in pairwise(ends)) / pairs
    return [seconds, reference, own_peak_mib(), loss]


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return pairs as conversations; with --turns, a prompt has that many earlier turns."""
    lines = (Path(args.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows, count = list(map(json.loads, lines)), args.batch * args.steps
    if not args.turns:
        return [
            {"prompt": [_turn("user", row["prompt"])],
             "chosen": [_turn("assistant", row["chosen"])],
             "rejected": [_turn("assistant", row["rejected"])]}
            for row in rows[:count]
        ]  # fmt: skip
    conversations = []
    for n in range(count):
        talk_rows = [
            rows[(n * (args.turns + 1) + index) % len(rows)] for index in range(args.turns + 1)
        ]
        turns = [
            _turn(role, row[key])
            for row in talk_rows
            for role, key in (("user", "document"), ("assistant", "summary"))
        ]
        conversations.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": turns[1:2]})
    return conversations


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ftlevel(args: argparse.Namespace) -> list[float]:
    import tempfile

    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig
    from ftlevel.events import NullListener

    ends, rows, marks = list[float](), _rows(args), dict[str, float]()

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
            "model": {"name_or_path": args.model, "dtype": args.dtype, "device": "cpu"},
            "data": {"cache": False}, "speed": {"verify": False},
            "train": {"max_steps": args.steps, "per_device_train_batch_size": args.batch,
                      "learning_rate": 1e-4, "logging_steps": 1},
            "output": {"dir": f"{folder}/run"},
        })  # fmt: skip
        result = train(config, rows, callbacks=[step_clock(ends)], listener=Stages())
    reference = (marks["end"] - marks["reference"]) / len(rows)
    return _figures(ends, args.batch, reference, result.summary["reference"]["first_loss"])


def _trl(args: argparse.Namespace) -> list[float]:
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    ends, rows = list[float](), _rows(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch,
                learning_rate=1e-4, logging_steps=1, report_to="none", use_cpu=True,
                bf16=args.dtype == "bfloat16", gradient_checkpointing=False, disable_tqdm=True,
                precompute_ref_log_probs=args.side == "trl-precomputed", save_strategy="no",
                max_length=None,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[step_clock(ends)],
        )  # fmt: skip
        setup_seconds = time.process_time() - before
        trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    precomputed = setup_seconds / len(rows) if args.side == "trl-precomputed" else 0.0
    return _figures(ends, args.batch, precomputed, loss)


if __name__ == "__main__":
    main()
