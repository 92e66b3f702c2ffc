"""Compare planned with measured memory: 16 settings on two real models.

    python benchmarks/plan.py --models .models [--only N] [--out FILE]
    python benchmarks/plan.py --models .models --process

With `--process`, `ftlevel plan` and three steps of `ftlevel train` on rows of data/ run as whole
processes, and the peak resident memory is VmHWM of Linux. Otherwise, each setting is planned and
trained for two steps in a process of its own, with one thread, so that micro-batches come one at
a time. Measured are

- live: the peak of the bytes that torch's CPU allocator has given out, as torch.profiler records
  every allocation, from the model in memory on, and the model's own bytes;
- rss: the peak of the resident memory above that of the process with its libraries imported.

Nothing of the plan is fitted to any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMOL, MINI = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
WORDS = ("the", "row", "table", "file", "closed", "ends", "once", "read", "each", "no", "that")


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, model and configuration of each setting."""
    for name, method, more in (
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
        yield f"SmolLM2 {name}", SMOL, {"method": method, **more}
    for name, method, more in (
        ("lora", {"kind": "lora"}, {}),
        ("full, 32 × 128", {"kind": "full"}, {"rows": 32, "length": 128}),
        ("adapter, checkpointing", {"kind": "adapter"}, {"gradient_checkpointing": True}),
        ("qlora", {"kind": "qlora"}, {}),
        ("prefix, 16 × 256", {"kind": "prefix"}, {"rows": 16, "length": 256}),
    ):
        yield f"MiniLM {name}", MINI, {"method": method, **more}


def build_config(models: Path, model: str, wish: dict[str, Any], folder: Path) -> Any:
    """Return the configuration of a setting, and write its rows."""
    from ftlevel.config import TrainConfig

    wish = dict(wish)
    method = wish.pop("method")
    rows, length = wish.pop("rows", 8), wish.pop("length", 256)
    fast = wish.pop("fast", True)
    classes = model == MINI
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        draw = random.Random(0)
        for at in range(2 * rows):  # alike, so that the fullest micro-batch is in any two steps
            words = draw.choices(WORDS, k=int(length * 0.9))
            row = {"text": " ".join(words)} | ({"label": "ab"[at % 2]} if classes else {})
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
                  **wish},
        "speed": {"fast": fast, "verify": False},
        "output": {"dir": str(folder / "run")},
    })  # fmt: skip


def planned(config: Any) -> dict[str, Any]:
    """Return what the plan says."""
    from ftlevel.models.loading import silence_loggers
    from ftlevel.training.forecast.fits import Device, estimate_requirement
    from ftlevel.training.plan.resolve import resolve

    with silence_loggers():
        found = estimate_requirement(resolve(config), Device.of("cpu"))
    return {"peak": found.peak, "at": found.at, "parts": found.parts}


def measured(config: Any) -> dict[str, Any]:
    """Return what a run held."""
    import psutil
    from transformers import TrainerCallback

    import ftlevel.commands.train as command
    from ftlevel.events import NullListener

    before = psutil.Process().memory_info().rss
    seen: dict[str, Any] = {}

    class Profile(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            import torch

            tensors = [*model.parameters(), *model.buffers(), *_packed(model)]
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            seen["model"] = sum(held.values())
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profile.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.profile.stop()
            events = [e for e in self.profile.profiler.kineto_results.events()
                      if e.name() == "[memory]"]  # fmt: skip
            now = most = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                now += event.nbytes()
                most = max(most, now)
            seen["peak"] = seen["model"] + most

    command.train(config, callbacks=[Profile()], listener=NullListener())
    import resource

    seen["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return seen


def _packed(model: Any) -> Iterator[Any]:
    """Yield the scales of packed weights."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
            state = state.state2


def process_settings(models: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield name and flags of each setting of `--process`."""
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


def compare_processes(models: Path) -> None:
    """Print planned and measured memory of whole processes."""
    print("| setting | planned MiB | measured MiB | off |\n|---|--:|--:|--:|")
    for name, flags in process_settings(models):
        command = [sys.executable, "-m", "ftlevel"]
        flags = [*flags, "--max-steps", "3", "--json"]
        done = subprocess.run([*command, "plan", *flags], capture_output=True, check=True)
        planned = json.loads(done.stdout)["process_bytes"]
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
            run = [*command, "train", *flags, "--output-dir", f"{folder}/run"]
            process = subprocess.Popen(run, stdout=nowhere, stderr=nowhere)
            status, peak = Path(f"/proc/{process.pid}/status"), 0
            while process.poll() is None:
                lines = status.read_text().splitlines()
                sizes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
                peak = max(peak, *sizes, 0)
                time.sleep(0.05)
        measured = peak * 1024
        off = planned / measured - 1
        print(f"| {name} | {planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {off:+.1%} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--only", type=int, action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--process", action="store_true", help="compare whole processes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        compare_processes(arguments.models)
        return
    every = list(settings())
    if arguments.part:
        which, number = arguments.part.split(":")
        _, model, wish = every[int(number)]
        with tempfile.TemporaryDirectory() as folder:
            config = build_config(arguments.models, model, wish, Path(folder))
            print(json.dumps({"planned": planned, "measured": measured}[which](config)))
        return
    rows = []
    print("| setting | planned MiB | live MiB | off | rss MiB | peak comes |")
    print("|---|--:|--:|--:|--:|---|")
    for number, (name, _, _) in enumerate(every):
        if arguments.only and number not in arguments.only:
            continue
        plan, real = (
            _ask(f"{which}:{number}", arguments.models) for which in ("planned", "measured")
        )
        off = plan["peak"] / real["peak"] - 1
        rows.append({"setting": name, "planned": plan, "measured": real, "off": off})
        mib = [f"{value / 2**20:,.0f}" for value in (plan["peak"], real["peak"], real["rss"])]
        print(
            f"| {name} | {mib[0]} | {mib[1]} | {off:+.1%} | {mib[2]} | {plan['at']} |", flush=True
        )
    worst = max(rows, key=lambda row: abs(row["off"]))
    print(f"\nworst: {worst['off']:+.1%} ({worst['setting']}), {len(rows)} settings")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


def _ask(part: str, models: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--models", str(models), "--part", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
