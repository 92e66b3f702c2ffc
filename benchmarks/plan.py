"""Compare planned with measured memory: 16 settings on two real models.

    python benchmarks/plan.py --models .models [--only N] [--out FILE]
    python benchmarks/plan.py --models .models --process

With `--process`, `ftlevel plan` and three steps of `ftlevel train` on rows of data/ run as whole
processes, and the peak resident memory is that of wait4. Otherwise, each setting is planned and
trained for two steps in its own process with one thread, so micro-batches are sequential. Measured
are

- live: the peak bytes of torch's CPU allocator, as torch.profiler records every allocation after
  the model is loaded, plus the model's bytes;
- rss: the peak resident memory above that of the process after its imports.

The plan is not fitted to these measurements.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMOL, MINI = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
WORDS = ("the", "row", "table", "file", "closed", "ends", "once", "read", "each", "no", "that")


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, model and configuration of each setting."""
    for name, method, options in (
        ("lora", {"kind": "lora"}, {}),
        ("lora, checkpointing", {"kind": "lora"}, {"gradient_checkpointing": True}),
        ("lora, 4 × 512", {"kind": "lora"}, {"rows": 4, "length": 512}),
        ("lora, 1 × 1,024", {"kind": "lora"}, {"rows": 1, "length": 1024}),
        ("qlora", {"kind": "qlora"}, {}),
        ("qlora, checkpointing", {"kind": "qlora"}, {"gradient_checkpointing": True}),
        ("full", {"kind": "full"}, {}),
        ("full, checkpointing", {"kind": "full"}, {"gradient_checkpointing": True}),
        ("adapter", {"kind": "adapter"}, {}),
        ("prefix, 1 × 512", {"kind": "prefix"}, {"rows": 1, "length": 512}),
        ("lora, no fast step", {"kind": "lora"}, {"fast": False}),
    ):
        yield f"SmolLM2 {name}", SMOL, {"method": method, **options}
    for name, method, options in (
        ("lora", {"kind": "lora"}, {}),
        ("full, 32 × 128", {"kind": "full"}, {"rows": 32, "length": 128}),
        ("adapter, checkpointing", {"kind": "adapter"}, {"gradient_checkpointing": True}),
        ("qlora", {"kind": "qlora"}, {}),
        ("prefix, 16 × 256", {"kind": "prefix"}, {"rows": 16, "length": 256}),
    ):
        yield f"MiniLM {name}", MINI, {"method": method, **options}


def build_config(models: Path, model: str, options: dict[str, Any], folder: Path) -> Any:
    """Return the configuration of a setting, and write its rows."""
    from ftlevel.config import TrainConfig

    options = dict(options)
    method = options.pop("method")
    rows, length = options.pop("rows", 8), options.pop("length", 256)
    fast = options.pop("fast", True)
    classes = model == MINI
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        generator = random.Random(0)
        for index in range(2 * rows):  # similar, so that any two steps have the largest micro-batch
            words = generator.choices(WORDS, k=int(length * 0.9))
            row = {"text": " ".join(words)} | ({"label": "ab"[index % 2]} if classes else {})
            file.write(json.dumps(row) + "\n")
    quant = {"kind": "4bit"} if method["kind"] == "qlora" else {}
    return TrainConfig.model_validate({
        "model": {"name_or_path": str(models / model)},
        "task": "text-classification" if classes else "text-generation",
        "method": {**method, "kind": method["kind"].replace("qlora", "lora")},
        "quant": quant,
        "data": {"dataset": str(path), "max_length": length, "overlong": "drop",
                 "validation_split": 0, "cache": False},
        "train": {"per_device_train_batch_size": rows, "max_steps": 2, "save_strategy": "no",
                  **options},
        "speed": {"fast": fast, "verify": False},
        "output": {"dir": str(folder / "run")},
    })  # fmt: skip


def planned(config: Any) -> dict[str, Any]:
    """Return the planned memory."""
    from ftlevel.models.loading import silence_loggers
    from ftlevel.training.forecast.fits import Device, estimate_requirement
    from ftlevel.training.plan.resolve import resolve

    with silence_loggers():
        requirement = estimate_requirement(resolve(config), Device.of("cpu"))
    return {"peak": requirement.peak, "at": requirement.at, "parts": requirement.parts}


def measured(config: Any) -> dict[str, Any]:
    """Return the measured memory of a run."""
    import psutil
    from transformers import TrainerCallback

    import ftlevel.commands.train as command
    from ftlevel.events import NullListener

    before = psutil.Process().memory_info().rss
    result: dict[str, Any] = {}

    class Profile(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            import torch

            tensors = [*model.parameters(), *model.buffers(), *_packed(model)]
            sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            result["model"] = sum(sizes.values())
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profile.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.profile.stop()
            events = [e for e in self.profile.profiler.kineto_results.events()
                      if e.name() == "[memory]"]  # fmt: skip
            current = peak = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                current += event.nbytes()
                peak = max(peak, current)
            result["peak"] = result["model"] + peak

    command.train(config, callbacks=[Profile()], listener=NullListener())
    import resource

    result["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return result


def _packed(model: Any) -> Iterator[Any]:
    """Yield the scales of packed weights."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
            state = state.state2


def process_settings(models: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield name and flags of each setting for `--process`."""
    smol, mini = str(models / SMOL), str(models / MINI)
    senses = ["--model", mini, "--dataset", "data/wordnet-supersense"]
    summaries = ["--dataset", "data/docstring-summary", "--task", "summarization"]
    for name, flags in (
        ("built-in", []),
        ("MiniLM", senses),
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
            yield f"{Path(model).name} embedding {dtype} {rows}", [*flags, *pairs]


def compare_processes(models: Path, only: list[int] | None) -> None:
    """Print planned and measured memory of whole processes."""
    print("| setting | planned MiB | measured MiB | off |\n|---|--:|--:|--:|")
    for index, (name, flags) in enumerate(process_settings(models)):
        if only and index not in only:
            continue
        command = [sys.executable, "-m", "ftlevel"]
        flags = [*flags, "--max-steps", "3", "--json"]
        result = subprocess.run([*command, "plan", *flags], capture_output=True, check=True)
        planned = json.loads(result.stdout)["process_bytes"]
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            run = [*command, "train", *flags, "--output-dir", f"{folder}/run"]
            process = subprocess.Popen(run, stdout=nowhere, stderr=nowhere)
            measured = os.wait4(process.pid, 0)[2].ru_maxrss * 1024
        error = planned / measured - 1
        print(f"| {name} | {planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {error:+.1%} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--only", type=int, action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--process", action="store_true", help="compare whole processes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        compare_processes(args.models, args.only)
        return
    all_settings = list(settings())
    if args.part:
        function_name, index = args.part.split(":")
        _, model, options = all_settings[int(index)]
        with tempfile.TemporaryDirectory() as folder:
            config = build_config(args.models, model, options, Path(folder))
            print(json.dumps({"planned": planned, "measured": measured}[function_name](config)))
        return
    rows = []
    print("| setting | planned MiB | live MiB | off | rss MiB | peak comes |")
    print("|---|--:|--:|--:|--:|---|")
    for index, (name, _, _) in enumerate(all_settings):
        if args.only and index not in args.only:
            continue
        plan, real = (
            _run_part(f"{function_name}:{index}", args.models)
            for function_name in ("planned", "measured")
        )
        error = plan["peak"] / real["peak"] - 1
        rows.append({"setting": name, "planned": plan, "measured": real, "off": error})
        mib = [f"{value / 2**20:,.0f}" for value in (plan["peak"], real["peak"], real["rss"])]
        print(
            f"| {name} | {mib[0]} | {mib[1]} | {error:+.1%} | {mib[2]} | {plan['at']} |", flush=True
        )
    worst = max(rows, key=lambda row: abs(row["off"]))
    print(f"\nworst: {worst['off']:+.1%} ({worst['setting']}), {len(rows)} settings")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def _run_part(part: str, models: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--models", str(models), "--part", part]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{part}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
