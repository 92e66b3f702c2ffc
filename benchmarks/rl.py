"""Compare GRPO steps with TRL on the same model, prompts, precision and batch.

    python benchmarks/rl.py --model .models/SmolLM2-135M-Instruct --data data/docstring-summary \
        --peer FOLDER --prompt-tokens 300 --new-tokens 64

Each side runs in its own process: ftlevel; TRL in the same precision without checkpointing (its
best); and TRL as shipped (bfloat16 autocast, checkpointing). `--peer` is the directory of TRL,
created by `pip install --no-deps --target FOLDER trl==1.16.0`. LoRA r 8 on all linear layers, no
dropout, beta 0. A step is `--prompts` × 8 completions of exactly `--new-tokens` tokens (EOS does
not end them). CPU seconds of all threads, without the first of several steps; peak memory including
libraries.

`--sides sampler,generate,continuous` compares sampling alone: ftlevel's sampler, transformers'
`generate`, and its continuous batching. `--steps` is then the number of rollouts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import alternate, run_side

SIDES = ("ftlevel", "trl", "trl-shipped")
SAMPLERS = ("sampler", "generate", "continuous")
GROUP = 8


def main() -> None:
    """Alternate all sides and print a table, or run one side and print its values as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder with train.jsonl")
    parser.add_argument("--peer", default="", help="directory of TRL")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure = _sampling if args.side in SAMPLERS else _trl
        print(json.dumps((_ftlevel if args.side == "ftlevel" else measure)(args)))
        return
    paths = {side: args.peer if "trl" in side else "" for side in args.sides.split(",")}
    cases = {side: partial(run_side, "--side", side, path) for side, path in paths.items()}
    results = alternate(cases, args.rounds, warm_ups=0)
    _print(results, args)


def _print(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    import torch

    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{args.dtype}, {args.prompts} prompts of {args.prompt_tokens} tokens × {GROUP} "
        f"completions of {args.new_tokens}, {max(args.steps - 1, 1)} steps, {args.rounds} rounds"
    )
    names = ("step_s", "sampling_s", "update_s", "peak_gib")
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in names}
        for side, runs in results.items()
    }
    reference = next((medians[side] for side in ("ftlevel", "sampler") if side in medians), None)
    print("| | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names))
    for side, figures in medians.items():
        cells = [
            f"{figures[name]:.3g}"
            + (
                f" ({figures[name] / reference[name]:.2f} ×)"
                if reference and figures is not reference
                else ""
            )
            for name in names
        ]
        print(f"| {side} | " + " | ".join(cells) + " |")


class _Clock:
    """CPU seconds of each step, and of the sampling in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.sampling: list[float] = []
        self._began = self._sampled = 0.0

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
                clock._began = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.process_time()
                clock.steps.append(now - clock._began)
                clock.sampling.append(clock._sampled)
                clock._began, clock._sampled = now, 0.0

        return Watch()

    def figures(self) -> dict[str, float]:
        counted = (values[1:] or values for values in (self.steps, self.sampling))
        step, sampling = map(statistics.median, counted)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "step_s": step,
            "sampling_s": sampling,
            "update_s": step - sampling,
            "peak_gib": peak,
        }


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


def _ftlevel(args: argparse.Namespace) -> dict[str, float]:
    from dataclasses import replace

    from transformers import AutoTokenizer

    from ftlevel.commands.train import train
    from ftlevel.config import TrainConfig
    from ftlevel.evaluation.rollouts import Rollouts

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


def _trl(args: argparse.Namespace) -> dict[str, float]:
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


def _sampling(args: argparse.Namespace) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    from ftlevel.evaluation.sampling import GroupSampler, Noise, SamplingOptions

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).eval()
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in _rows(args, tokenizer)
    ]
    sampling = dict.fromkeys(("max_new_tokens", "min_new_tokens"), args.new_tokens)
    settings: Any = {"do_sample": True, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    numbers = list(range(args.prompts))

    def sample_with_ftlevel(selected: list[list[int]]) -> None:
        sampler = GroupSampler(model, tokenizer)
        sampler.sample(
            selected, numbers, SamplingOptions(GROUP, 1.0, args.new_tokens, ()), Noise(0, 0)
        )
        sampler.close()

    def generate(selected: list[list[int]]) -> None:
        texts = [{"input_ids": ids} for ids in selected for _ in range(GROUP)]
        model.generate(**tokenizer.pad(texts, padding_side="left", return_tensors="pt"), **settings)

    def continuous(selected: list[list[int]]) -> None:
        config = GenerationConfig(**settings, eos_token_id=-1)
        small = ContinuousBatchingConfig(max_memory_percent=0.1)  # the default uses all memory
        texts = [ids for ids in selected for _ in range(GROUP)]
        model.generate_batch(texts, config, small, warmup=False)

    sample = {"sampler": sample_with_ftlevel, "generate": generate, "continuous": continuous}[
        args.side
    ]
    settings |= {"max_new_tokens": args.new_tokens} if sample is continuous else sampling
    seconds = []
    with torch.no_grad():
        for index in range(args.steps):
            start = time.process_time()
            sample(prompts[index * args.prompts : (index + 1) * args.prompts])
            seconds.append(time.process_time() - start)
    step = statistics.median(seconds[1:] or seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"step_s": step, "sampling_s": step, "update_s": 0.0, "peak_gib": peak}


if __name__ == "__main__":
    main()
