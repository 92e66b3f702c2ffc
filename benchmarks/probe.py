"""How near `plan --probe` comes to the speed of the run: a probe, then the run, in turns.

    python benchmarks/probe.py --models .models --data data [--rounds 2] [--out FILE]

Each is a process of its own with one thread. Compared are tokens per second of the steps: by the
clock, and by the processor's time, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMOL, MINI = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
SETTINGS: dict[str, dict[str, Any]] = {
    "MiniLM lora, classes": {
        "model": MINI, "task": "text-classification", "dataset": "wordnet-supersense",
        "method": {"kind": "lora"}, "batch": 8, "steps": 60,
    },
    "MiniLM full, tags": {
        "model": MINI, "task": "token-classification", "dataset": "factbook-ner",
        "method": {"kind": "full"}, "batch": 8, "steps": 40,
    },
    "SmolLM2 lora, definitions": {
        "model": SMOL, "task": "text-generation", "dataset": "wordnet-define",
        "method": {"kind": "lora"}, "batch": 4, "steps": 16,
    },
}  # fmt: skip


def build_config(wish: dict[str, Any], models: Path, data: Path, run: str) -> Any:
    """Return the configuration of a setting."""
    from ftlevel.config import TrainConfig

    return TrainConfig.model_validate({
        "model": {"name_or_path": str(models / wish["model"])},
        "task": wish["task"], "method": wish["method"],
        "data": {"dataset": str(data / wish["dataset"]), "max_eval_samples": 8},
        "train": {"per_device_train_batch_size": wish["batch"], "max_steps": wish["steps"],
                  "save_strategy": "no"},
        "output": {"dir": run},
    })  # fmt: skip


def probe(config: Any) -> dict[str, float]:
    """Return tokens per second as a probe finds them, by both clocks."""
    from ftlevel.models.loading import silence_loggers
    from ftlevel.training.forecast.seconds import measure_time
    from ftlevel.training.plan.resolve import resolve

    with silence_loggers():
        found = measure_time(config, resolve(config))
    return {"clock": found.tokens_per_s, "processor": found.tokens_per_cpu_s}


def run(config: Any) -> dict[str, float]:
    """Return tokens per second of a run's steps, by both clocks."""
    from transformers import TrainerCallback

    from ftlevel.commands.train import train
    from ftlevel.events import NullListener

    spent = {"clock": 0.0, "processor": 0.0}
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    begun: dict[str, float] = {}

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun.update({name: clock() for name, clock in clocks.items()})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            for name, clock in clocks.items():
                spent[name] += clock() - begun[name]

    result = train(config, callbacks=[Steps()], listener=NullListener())
    lines = (Path(str(result.path)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = json.loads(lines[-1])["tokens"]
    return {name: tokens / seconds for name, seconds in spent.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".models"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        which, name = asked.part.split(":")
        with tempfile.TemporaryDirectory() as folder:
            config = build_config(SETTINGS[name], asked.models, asked.data, f"{folder}/run")
            print(json.dumps({"probe": probe, "run": run}[which](config)))
        return
    rows = []
    print("| setting | round | by | probe, tokens/s | run, tokens/s | off |")
    print("|---|--:|---|--:|--:|--:|")
    for name in SETTINGS:
        for number in range(1, asked.rounds + 1):
            found = {which: _ask(f"{which}:{name}", asked) for which in ("probe", "run")}
            for by in ("processor", "clock"):
                of_probe, of_run = found["probe"][by], found["run"][by]
                off = of_run / of_probe - 1  # of the time
                rows.append({"setting": name, "round": number, "by": by, **found, "off": off})
                speeds = f"{of_probe:,.0f} | {of_run:,.0f} | {off:+.0%}"
                print(f"| {name} | {number} | {by} | {speeds} |", flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(rows, indent=1))


def _ask(part: str, asked: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--models", str(asked.models), "--data", str(asked.data),
               "--part", part]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{part}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
