"""Compare GRPO steps with TRL on the same model, prompts, precision and batch.

    python benchmarks/rl.py --model .models/SmolLM2-135M-Instruct --data data/docstring-summary \
        --peer FOLDER --prompt-tokens 300 --new-tokens 64

Each side runs in its own process: ftlevel; TRL in the same precision without checkpointing (its
best); and TRL as shipped (bfloat16 autocast, checkpointing). `--peer` is the directory of TRL,
created by `pip install --no-deps --target FOLDER trl==1.16.0`. LoRA r 8 on all linear layers, no
dropout, beta 0. A step is `--prompts` × 8 completions of exactly `--new-tokens` tokens (EOS does
not end them). Wall-clock seconds of a step, CPU seconds of all threads (in total, sampling, the
rest), without the first of several steps; peak memory including libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import compare_sides, markdown, own_peak_mib

GROUP = 8
COLUMNS = ("wall_s", "step_s", "sampling_s", "update_s", "peak_gib")


def main() -> None:
    """Measure the sides and print a table; values in parentheses are relative to ftlevel's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with train.jsonl")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=3)
    args, results = compare_sides(parser, {"ftlevel": _ftlevel, "trl": _trl, "trl-shipped": _trl})
    medians = {
        side: [statistics.median(column) for column in zip(*runs, strict=True)]
        for side, runs in results.items()
    }
    reference = medians.get("ftlevel")
    rows = []
    for side, figures in medians.items():
        ratios = [f" ({a / b:.2f} ×)" for a, b in zip(figures, reference or (), strict=False)]
        cells = [f"{value:.3g}" for value in figures]
        rows.append([side, *map(str.__add__, cells, ratios or [""] * len(cells))])
    print(
        f"{args.dtype}, {args.prompts} prompts of {args.prompt_tokens} tokens × {GROUP} "
        f"completions of {args.new_tokens}, {max(args.steps - 1, 1)} steps, {args.rounds} rounds"
    )
    print(markdown(("", *COLUMNS), rows))


class _Clock:
    """Seconds of each step on the wall clock, of the CPU, and of the CPU in sampling."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []
        self._began, self._sampled = (0.0, 0.0), 0.0

    def wrap(self, owner: Any, name: str) -> None:
        """Count the CPU seconds of a method of `owner` as sampling."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed_call(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                self._sampled += time.process_time() - start

        setattr(owner, name, timed_call)

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._began = time.perf_counter(), time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.perf_counter(), time.process_time()
                wall, cpu = (a - b for a, b in zip(now, clock._began, strict=True))
                clock.steps.append((wall, cpu, clock._sampled))
                clock._began, clock._sampled = now, 0.0

        return Watch()

    def figures(self) -> list[float]:
        """Return the values of `COLUMNS`."""
        steps = self.steps[1:] or self.steps
        wall, step, sampling = (statistics.median(column) for column in zip(*steps, strict=True))
        return [wall, step, sampling, step - sampling, own_peak_mib() / 1024]


def _rows(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Return prompts of about `prompt_tokens` tokens, joined from several documents."""
    lines = (Path(args.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    available_tokens = args.prompt_tokens - 35  # minus the chat template and the instruction
    rows, ids = list[dict[str, Any]](), list[int]()
    for row in map(json.loads, lines):
        ids += tokenizer(row["document"] + "\n", add_special_tokens=False)["input_ids"]
        if len(ids) < available_tokens:
            continue
        text = "Summarize in one line:\n" + tokenizer.decode(ids[:available_tokens])
        rows.append({"prompt": [{"role": "user", "content": text}], "answer": row["summary"]})
        ids = []
        if len(rows) == args.prompts * args.steps:
            break
    return rows


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    common = {"learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no"}
    return {"max_steps": args.steps, **common}


def _ftlevel(args: argparse.Namespace) -> list[float]:
    from dataclasses import replace

    from transformers import AutoTokenizer

    from ftlevel.cli.startup import prepare
    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig
    from ftlevel.extras.rl.rollouts import Rollouts

    prepare()  # as the command does
    clock, original = _Clock(), Rollouts.__init__

    def init_without_stops(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self._options = replace(self._options, stops=())

    Rollouts.__init__ = init_without_stops  # type: ignore[method-assign]
    clock.wrap(Rollouts, "_sample")
    rows = _rows(args, AutoTokenizer.from_pretrained(args.model))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate(
            {
                "task": "rl",
                "rl": {
                    "reward": "rouge:rouge1",
                    "loss": "dapo",
                    "num_generations": GROUP,
                    "max_completion_length": args.new_tokens,
                    "check_groups": 0,
                },
                "model": {"name_or_path": args.model, "dtype": args.dtype, "device": "cpu"},
                "data": {"cache": False},
                "speed": {"verify": False},
                "train": {**_steps(args), "per_device_train_batch_size": args.prompts},
                "output": {"dir": f"{folder}/run"},
            }
        )
        train(config, rows, callbacks=[clock.callback()])
    return clock.figures()


def _trl(args: argparse.Namespace) -> list[float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    clock, shipped = _Clock(), args.side == "trl-shipped"
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def word_overlap(completions: Any, answer: Any, **_: Any) -> list[float]:
        completion_words = [
            set(completion[0]["content"].lower().split()) for completion in completions
        ]
        answer_words = [set(text.lower().split()) for text in answer]
        return [
            len(a & b) / max(len(a | b), 1)
            for a, b in zip(completion_words, answer_words, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=word_overlap,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=shipped or args.dtype == "bfloat16",
                gradient_checkpointing=shipped,
                per_device_train_batch_size=GROUP,
                gradient_accumulation_steps=args.prompts,
                num_generations=GROUP,
                max_completion_length=args.new_tokens,
                generation_kwargs={"min_new_tokens": args.new_tokens},
                report_to="none",
                disable_tqdm=True,
                **_steps(args),
            ),
            train_dataset=Dataset.from_list(_rows(args, tokenizer)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[clock.callback()],
        )
        clock.wrap(trainer, "_generate_single_turn")
        trainer.train()
    return clock.figures()


if __name__ == "__main__":
    main()
