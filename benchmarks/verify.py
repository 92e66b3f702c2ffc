#!/usr/bin/env python3
"""What `--verify-fast` sees: distances to float32, planted faults, false alarms, and what it costs.

    python benchmarks/verify.py distances
    python benchmarks/verify.py faults
    python benchmarks/verify.py clean --runs 50
    python benchmarks/verify.py cost

`distances` compares the gradients of the packed and of the plain step in bfloat16 with those of
the plain step in float32, tensor by tensor, over 20 batches. `faults` plants one fault at a time in
the fast step and says whether the proof, and the few rows that every run compares, stop the run.
`clean` draws seeds, and so rows and starts, and counts what is stopped without a fault. `cost`
times those few rows against 100 steps of the run.

MiniLM, SmolLM2 and the sets are those of `scripts/fetch_models.py` and `scripts/build_data.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from faults import COUNTS, LORA, NORMS, PACKING, PREFIX, TEXT, Fault, target_off

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.errors import RunError
from ftlevel.evaluation.scoring import batches
from ftlevel.events import Silence
from ftlevel.models.loading import quiet_libraries
from ftlevel.training.build_trainer import build_trainer
from ftlevel.training.model import Adapted, load_adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.verify.compare import Apart, added, by_kind, compare_gradients
from ftlevel.training.verify.float32 import whole_in_float32
from ftlevel.training.verify.proof import verify_step
from ftlevel.training.verify.steps import Steps, moved_from_start

DTYPES = ("float32", "bfloat16")
BATCHES = 20


@dataclass(frozen=True)
class Setting:
    """A run whose step is looked at.

    Attributes:
        name: for the table.
        config: of the run, without its precision.
        faults: what can be planted in it.
    """

    name: str
    config: dict[str, Any]
    faults: dict[str, Fault]


def settings(models: Path, data: Path, beginning: Path) -> list[Setting]:
    """Return the runs: decoders and an encoder, LoRA and methods without fused layers."""
    minilm = {
        "model": {"name_or_path": str(models / "all-MiniLM-L6-v2")},
        "data": {"dataset": str(data / "wordnet-supersense"), "max_samples": 200},
        "task": "text-classification",
        "train": {"gradient_accumulation_steps": 8},  # rows of 30 tokens: two micro-batches
    }
    small = {"train": {"gradient_accumulation_steps": 2}, "data": {"max_samples": 96}}
    alike = {
        "data": {"dataset": str(beginning)},
        "speed": {"parallel_workers": 2, "share_prefixes": "always"},
        "train": {"gradient_accumulation_steps": 2},
    }
    return [
        Setting("lora, decoder", small, {**LORA, **NORMS, **PACKING, **TEXT}),
        Setting("qlora, decoder", {**small, "method": {"kind": "qlora"}, "quant": {"kind": "4bit"}},
                {**LORA, **PACKING, **TEXT}),
        Setting("adapter, decoder", {**small, "method": {"kind": "adapter"}},
                {**NORMS, **PACKING, **TEXT}),
        Setting("prefix, decoder, padded", {**small, "method": {"kind": "prefix"}},
                {**NORMS, **COUNTS, "a target off by one": target_off}),
        Setting("lora, encoder", minilm, {**LORA, **PACKING}),
        Setting("full, encoder", {**minilm, "method": {"kind": "full"}}, PACKING),
        Setting("lora, decoder, rows that begin alike", alike, PREFIX),
    ]  # fmt: skip


def write_rows(path: Path) -> None:
    """Write rows with one beginning of some hundred tokens."""
    beginning = " ".join(
        f"Rule {i}: the answer to {i} and {i + 1} is {2 * i + 1}." for i in range(24)
    )
    with path.open("w", encoding="utf-8") as lines:
        for i in range(16):
            row = {
                "prompt": f"{beginning} What is {i} and {i + 1}?",
                "completion": f"{2 * i + 1} " * 80,
            }
            lines.write(json.dumps(row) + "\n")


def build(config: dict[str, Any], dtype: str, seed: int = 42, **speed: Any) -> Any:
    """Return configuration, plan and model of a run."""
    given = {**config, "model": {**config.get("model", {}), "dtype": dtype}}
    given["train"] = {**config.get("train", {}), "seed": seed}
    given["speed"] = {**config.get("speed", {}), **speed}
    parsed = TrainConfig.model_validate(given)
    with quiet_libraries():
        plan = resolve(parsed)
        return parsed, plan, load_adapted(parsed, plan, Silence())


def is_stopped(config: TrainConfig, plan: Plan, adapted: Adapted) -> str:
    """Return what the comparison says against the step, empty for nothing."""
    try:
        if verify_step(config, plan, adapted, Silence()) is None:
            raise ValueError("nothing was compared")
    except RunError as error:
        return str(error)
    return ""


def asking(config: TrainConfig, verify: bool | None) -> TrainConfig:
    """Return the configuration with another `speed.verify`."""
    return config.model_copy(update={"speed": config.speed.model_copy(update={"verify": verify})})


def plant(every: list[Setting]) -> None:
    """Print a table of what is seen of each fault: by the proof, and by the few rows of any run."""
    print("| run | fault | " + " | ".join(f"{d}, asked | {d}, always" for d in DTYPES) + " |")
    print("|---|---|" + "---|" * 2 * len(DTYPES))
    for setting in every:
        built = {dtype: build(setting.config, dtype) for dtype in DTYPES}
        for name, fault in {"none": contextlib.nullcontext, **setting.faults}.items():
            cells = []
            for dtype in DTYPES:
                config, plan, adapted = built[dtype]
                for verify in (True, None):
                    with fault():
                        found = is_stopped(asking(config, verify), plan, adapted)
                    cells.append("stopped" if found else "–")
            print(f"| {setting.name} | {name} | " + " | ".join(cells) + " |", flush=True)


def count_false_alarms(every: list[Setting], runs: int) -> None:
    """Print how many clean runs are stopped, of `runs` with other seeds, rows and starts."""
    for setting in every:
        for dtype in DTYPES:
            alarms: list[str] = []
            for seed in range(runs):
                config, plan, adapted = build(setting.config, dtype, seed)
                rows = list(plan.data.train)
                turned = rows[seed % len(rows) :] + rows[: seed % len(rows)]
                object.__setattr__(plan.data, "train", turned)
                alarms += filter(None, [
                    is_stopped(asking(config, verify), plan, adapted) for verify in (True, None)
                ])  # fmt: skip
                if adapted.fast.workers:
                    adapted.fast.workers.close()
            print(f"{setting.name}, {dtype}: {len(alarms)} of {2 * runs} comparisons", flush=True)
            for alarm in alarms[:3]:
                print(f"    {alarm}")


@contextlib.contextmanager
def steps_of(config: TrainConfig, plan: Plan, adapted: Adapted) -> Iterator[Steps]:
    """Give what computes steps of a run."""
    with TemporaryDirectory() as nowhere:
        trainer = build_trainer(config, plan, adapted, RunDirectory(Path(nowhere)), None)
        yield Steps(trainer, plan.model.pad_id)


def measure_distances(every: list[Setting]) -> None:
    """Print how far packed and plain gradients in bfloat16 are from plain ones in float32."""
    print("| run | kind | plain | packed | packed from plain |")
    print("|---|---|--:|--:|--:|")
    for setting in every:
        config, plan, adapted = build(setting.config, "bfloat16")
        size = config.train.per_device_train_batch_size
        sums: dict[str, dict[str, Apart]] = {"plain": {}, "packed": {}, "between": {}}
        with steps_of(config, plan, adapted) as steps, moved_from_start(adapted.model):
            for rows in list(batches(plan.data.train, size))[:BATCHES]:
                with whole_in_float32(adapted.model):
                    exact = steps.plain(rows, size, "float32").gradients
                plain = steps.plain(rows, size, "bfloat16").gradients
                fast = steps.fast(rows, "bfloat16").gradients
                for name, pair in (("plain", (plain, exact)), ("packed", (fast, exact)),
                                   ("between", (fast, plain))):  # fmt: skip
                    sums[name] = added(sums[name], compare_gradients(*pair))
        kinds = {name: by_kind(found) for name, found in sums.items()}
        for kind in kinds["plain"]:
            cells = [f"{kinds[name][kind].distance:.4f}" for name in sums]
            print(f"| {setting.name} | {kind} | " + " | ".join(cells) + " |", flush=True)


def measure_cost(every: list[Setting]) -> None:
    """Print how long the rows of every run take, and 100 of its steps."""
    print("| run | the rows of every run | 100 steps | share |")
    print("|---|--:|--:|--:|")
    for setting in every:
        config, plan, adapted = build(setting.config, "auto")
        verify_step(config, plan, adapted, Silence())
        began = time.process_time()
        verify_step(config, plan, adapted, Silence())
        took = time.process_time() - began
        a_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
        with steps_of(config, plan, adapted) as steps:
            parts = list(batches(plan.data.train, a_step))
            steps.fast(parts[0], plan.model.dtype)
            began = time.process_time()
            for number in range(10):
                steps.fast(parts[number % len(parts)], plan.model.dtype)
            hundred = 10 * (time.process_time() - began)
        print(
            f"| {setting.name} | {took:.2f} s | {hundred:.1f} s | {took / hundred:.1%} |",
            flush=True,
        )


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("distances", "faults", "clean", "cost"))
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        beginning = Path(folder) / "alike.jsonl"
        write_rows(beginning)
        every = settings(given.models, given.data, beginning)
        chosen = [s for s in every if not given.only or s.name in given.only]
        if given.what == "faults":
            plant(chosen)
        elif given.what == "clean":
            count_false_alarms(chosen, given.runs)
        elif given.what == "distances":
            measure_distances(chosen)
        else:
            measure_cost(chosen)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
