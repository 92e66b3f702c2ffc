#!/usr/bin/env python3
"""What `--verify-fast` sees: distances to float32, planted faults, false alarms, and what it costs.

    python benchmarks/verify.py distances
    python benchmarks/verify.py faults
    python benchmarks/verify.py clean --runs 4       # goes on where it was
    python benchmarks/verify.py cost

`distances` compares the gradients of the packed and of the plain step in bfloat16 with those of
the plain step in float32, tensor by tensor, over 20 batches. `faults` plants one fault at a time in
the fast step and says whether the proof, and the few rows that every run compares, stop the run.
`clean` draws seeds, and so rows and starts, and counts what is stopped without a fault, for every
method on a tiny model of every kind, in steps of four short rows, where little averages out. `cost`
times those few rows against 100 steps of the run.

MiniLM, SmolLM2 and the sets are those of `scripts/fetch_models.py` and `scripts/build_data.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from defaults import ENTRIES
from faults import COUNTS, LORA, NORMS, PACKING, PREFIX, TEXT, Fault, target_off
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, RunError
from ftlevel.evaluation.scoring import batches
from ftlevel.events import NullListener
from ftlevel.models.loading import silence_loggers
from ftlevel.training.build_trainer import build_trainer
from ftlevel.training.model import PreparedModel, load_adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState
from ftlevel.training.verify.bounds import GradientDifference, added, by_kind, compare_gradients
from ftlevel.training.verify.proof import cast_to_float32, verify_step
from ftlevel.training.verify.steps import Steps, perturb_weights

DTYPES = ("float32", "bfloat16")
BATCHES = 20


@dataclass(frozen=True)
class Setting:
    """A run whose step is looked at.

    Attributes:
        name: for the table.
        config: of the run, without its precision.
    """

    name: str
    config: dict[str, Any]


def settings(models: Path, data: Path) -> list[Setting]:
    """Return ordinary runs: decoders and an encoder, LoRA and methods without fused layers."""
    minilm = {
        "model": {"name_or_path": str(models / "all-MiniLM-L6-v2")},
        "data": {"dataset": str(data / "wordnet-supersense"), "max_samples": 200},
        "task": "text-classification",
        "train": {"gradient_accumulation_steps": 8},  # rows of 30 tokens: two micro-batches
    }
    small = {"train": {"gradient_accumulation_steps": 2}, "data": {"max_samples": 96}}
    four_bits = {"method": {"kind": "qlora"}, "quant": {"kind": "4bit"}}
    return [
        Setting("lora, decoder", small),
        Setting("qlora, decoder", {**small, **four_bits}),
        Setting("adapter, decoder", {**small, "method": {"kind": "adapter"}}),
        Setting("lora, encoder", minilm),
    ]


def short_settings(models: Path, data: Path, folder: Path) -> list[Setting]:
    """Return runs of every method on a tiny model of every kind, in steps of four short rows."""
    write_models(models, folder)
    steps = {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
             "speed": {"tokens_per_micro_batch": 64}}  # fmt: skip
    names = {"dataset": str(data / "cldr-names"), "columns": {"source": "en", "target": "de"}}
    supersense = {"dataset": str(data / "wordnet-supersense/train.jsonl"), "validation_split": 0.5}
    kinds: dict[str, dict[str, Any]] = {
        "encoder": {
            "model": {"name_or_path": str(folder / "bert")},
            "data": {**supersense, "max_samples": 96},
            "task": "text-classification",
        },
        "decoder": {"data": {**names, "max_samples": 96}, "task": "translation"},
        "encoder-decoder": {
            "model": {"name_or_path": str(folder / "t5")},
            "data": {**names, "max_samples": 96},
            "task": "translation",
        },
    }
    return [
        Setting(f"{method}, {kind}", {**config, **steps, "method": entry.spec})
        for kind, config in kinds.items()
        for method, entry in ENTRIES.items()
        if kind == "encoder" or method != "linear-probe"
    ]


PADDED = {**COUNTS, "a target off by one": target_off}
DECODER = {**NORMS, **PACKING, **TEXT}
FAULTS: dict[str, dict[str, Fault]] = {
    "lora, decoder": {**LORA, **DECODER},
    "qlora, decoder": {**LORA, **DECODER},
    "adapter, decoder": DECODER,
    "ia3, decoder": DECODER,
    "oft, decoder": DECODER,
    "full, decoder": {**PACKING, **TEXT},
    "ln-tuning, decoder": {**PACKING, **TEXT},
    "prefix, decoder": {**NORMS, **PADDED},
    "lora, encoder": {**LORA, **PACKING},
    "adapter, encoder": PACKING,
    "ia3, encoder": PACKING,
    "full, encoder": PACKING,
    "lora, encoder-decoder": {**LORA, **PADDED},
    "adapter, encoder-decoder": PADDED,
    "full, encoder-decoder": PADDED,
}
"""What can be planted in which run."""


def fault_settings(short: list[Setting], folder: Path) -> list[Setting]:
    """Return the runs in which faults are planted: a step has two micro-batches of two rows."""
    alike = {
        "data": {"dataset": str(folder / "alike.jsonl")},
        "speed": {"parallel_workers": 2, "share_prefixes": "always"},
        "train": {"gradient_accumulation_steps": 2},
    }
    write_rows(folder / "alike.jsonl")
    tokens = {"encoder": 40, "decoder": 96, "encoder-decoder": 24}
    speed = {kind: {"tokens_per_micro_batch": size} for kind, size in tokens.items()}
    return [
        *(replace(run, config={**run.config, "speed": speed[run.name.rpartition(", ")[2]]})
          for run in short if run.name in FAULTS),
        Setting("lora, decoder, rows that begin alike", alike),
    ]  # fmt: skip


def write_models(models: Path, folder: Path) -> None:
    """Write an encoder and an encoder-decoder of two layers, with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(models / "all-MiniLM-L6-v2")
    tokenizer.eos_token = tokenizer.sep_token
    size = len(tokenizer)
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=size, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                      intermediate_size=512)  # fmt: skip
    t5 = T5Config(vocab_size=size, d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4,
                  decoder_start_token_id=tokenizer.pad_token_id,
                  pad_token_id=tokenizer.pad_token_id,
                  eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    for name, model in (("bert", BertModel(bert)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


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
    with silence_loggers():
        plan = resolve(parsed)
        return parsed, plan, load_adapted(parsed, plan, NullListener())


def is_stopped(config: TrainConfig, plan: Plan, adapted: PreparedModel) -> str:
    """Return what the comparison says against the step, empty for nothing."""
    try:
        if verify_step(config, plan, adapted, NullListener()) is None:
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
        faults = FAULTS.get(setting.name, PREFIX)
        for name, fault in {"none": contextlib.nullcontext, **faults}.items():
            cells = []
            for dtype in DTYPES:
                config, plan, adapted = built[dtype]
                for verify in (True, None):
                    with fault():
                        found = is_stopped(asking(config, verify), plan, adapted)
                    cells.append("stopped" if found else "–")
            print(f"| {setting.name} | {name} | " + " | ".join(cells) + " |", flush=True)


def count_false_alarms(every: list[Setting], runs: int, kept: Path) -> None:
    """Print how many clean runs are stopped, of `runs` with other seeds, rows and starts.

    Each run becomes a line of `kept`, and those that are there are not made again.
    """
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    made = {tuple(run["of"]): run["alarms"] for run in map(json.loads, lines)}
    for seed in range(runs):
        for setting, dtype in product(every, DTYPES):
            key = (setting.name, dtype, seed)
            if key not in made:
                made[key] = alarms_of(setting, dtype, seed)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"of": key, "alarms": made[key]}) + "\n")
    counts: dict[str, dict[str, list[int]]] = {}
    for (name, dtype, _), alarms in made.items():
        if alarms is not None:
            method, _, kind = name.rpartition(", ")
            found = counts.setdefault(kind, {dtype: [0, 0] for dtype in DTYPES})[dtype]
            found[:] = found[0] + len(alarms), found[1] + 2
            for alarm in alarms:
                print(f"{method}, {kind}, {dtype}: {alarm}", file=sys.stderr)
    print("| model | " + " | ".join(DTYPES) + " |\n|---|" + "--:|" * len(DTYPES))
    for kind, of in counts.items():
        cells = ["{} of {}".format(*of[dtype]) for dtype in DTYPES]
        print(f"| {kind} | " + " | ".join(cells) + " |")


def alarms_of(setting: Setting, dtype: str, seed: int) -> list[str] | None:
    """Return what stops a clean run, asked and not; None where a method is not for a model."""
    try:
        config, plan, adapted = build(setting.config, dtype, seed)
    except ConfigError as error:
        print(f"{setting.name}: {error}", file=sys.stderr, flush=True)
        return None
    rows = list(plan.data.train)
    turned = rows[(4 * seed) % len(rows) :] + rows[: (4 * seed) % len(rows)]
    object.__setattr__(plan.data, "train", turned)
    found = [is_stopped(asking(config, verify), plan, adapted) for verify in (True, None)]
    if adapted.fast and adapted.fast.workers:
        adapted.fast.workers.close()
    return [alarm for alarm in found if alarm]


@contextlib.contextmanager
def steps_of(config: TrainConfig, plan: Plan, adapted: PreparedModel) -> Iterator[Steps]:
    """Give what computes steps of a run."""
    with TemporaryDirectory() as nowhere:
        nobody = RunDirectory(Path(nowhere))
        trainer = build_trainer(config, plan, adapted, nobody, ResumeState(), Processes())
        yield Steps(trainer, plan.model.pad_id)


def measure_distances(every: list[Setting]) -> None:
    """Print how far packed and plain gradients in bfloat16 are from plain ones in float32."""
    print("| run | kind | plain | packed | packed from plain |")
    print("|---|---|--:|--:|--:|")
    for setting in every:
        config, plan, adapted = build(setting.config, "bfloat16")
        size = config.train.per_device_train_batch_size
        sums: dict[str, dict[str, GradientDifference]] = {"plain": {}, "packed": {}, "between": {}}
        with steps_of(config, plan, adapted) as steps, perturb_weights(adapted.model):
            for rows in list(batches(plan.data.train, size))[:BATCHES]:
                with cast_to_float32(adapted.model):
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
        verify_step(config, plan, adapted, NullListener())
        began = time.process_time()
        verify_step(config, plan, adapted, NullListener())
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
    parser.add_argument("--kept", type=Path, default=Path("runs/clean.jsonl"))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        every = settings(given.models, given.data)
        if given.what in ("faults", "clean"):
            every = short_settings(given.models, given.data, Path(folder))
        if given.what == "faults":
            every = fault_settings(every, Path(folder))
        chosen = [s for s in every if not given.only or s.name in given.only]
        if given.what == "faults":
            plant(chosen)
        elif given.what == "clean":
            count_false_alarms(chosen, given.runs, given.kept)
        elif given.what == "distances":
            measure_distances(chosen)
        else:
            measure_cost(chosen)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
