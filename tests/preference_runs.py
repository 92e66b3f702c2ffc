"""Preference runs on synthetic rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import task_data
from ftlevel.commands.train import TrainResult, train
from ftlevel.config import TrainConfig


def create_pair(i: int) -> dict[str, str]:
    words = task_data.WORDS
    prompt = " ".join(words[(i * k + k) % 8] for k in range(3, 40 + i % 5))
    return {
        "prompt": f"Tell me of {i}: {prompt}",
        "chosen": f"the {words[i % 8]} is good",
        "rejected": f"a {words[(i + 3) % 8]} of {words[(i + 1) % 8]} it is not"[: 12 + 3 * (i % 7)],
    }


def create_labeled_answer(i: int) -> dict[str, Any]:
    pair = create_pair(i)
    return {"prompt": pair["prompt"], "completion": pair[("chosen", "rejected")[i % 2]],
            "label": i % 2 == 0}  # fmt: skip


def write_rows(
    directory: Path, create_row: Callable[[int], Any] = create_pair, rows: int = 16
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for split, begin, end in (("train", 0, rows), ("validation", rows, rows + 6)):
        lines = [json.dumps(create_row(i)) for i in range(begin, end)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


def run(
    base: Path, rows: Path, out: Path, loss: str = "dpo", **sections: dict[str, Any] | str
) -> TrainResult:
    """Train a few steps; `sections` override the defaults."""
    values: dict[str, Any] = {
        "task": "preference",
        "preference": {"loss": loss},
        "model": {"name_or_path": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(rows)},
        "train": {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1,
                  "per_device_train_batch_size": 4},
        "output": {"dir": str(out)},
    }  # fmt: skip
    for name, section in sections.items():
        default = values.get(name)
        values[name] = {**default, **section} if isinstance(default, dict) and isinstance(
            section, dict) else section  # fmt: skip
    return train(TrainConfig.model_validate(values))


def losses(out: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]
