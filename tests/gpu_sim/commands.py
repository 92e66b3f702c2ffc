"""Commands that run on the simulated device and on the CPU, and the tiny models and rows they use."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftlevel.methods import METHOD_INFO
from task_data import ROWS, WORDS
from tiny_models import build_config

MEDIUM = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
          "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
"""Overrides of the model whose memory is compared with the estimate of `plan`."""


def without_dropout(family: str) -> dict[str, float]:
    """Return overrides of a tiny model: the devices draw other masks, so that losses would differ."""
    values = build_config(family).to_dict()
    return {key: 0.0 for key in values if "drop" in key and isinstance(values[key], float)}


@dataclass(frozen=True)
class Cell:
    """Commands to run one after the other in a new folder, once on each device.

    Attributes:
        name: name of the cell, `group/name`.
        lines: arguments of `ftlevel`; `{llama}`, `{bert}`, … are models, `{sft}`, … files.
        card: settings of the device, as in `device.build_environment`.
        tolerance: largest relative difference of a loss.
        otherwise: flags of the run on the CPU in place of flags of the run on the card.
        waits: whether the host may wait in a training step, with the reason in a comment.
        is_planned: whether the last command is `plan --json`, whose estimate must be near the peak.
    """

    name: str
    lines: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-2
    otherwise: tuple[tuple[str, str], ...] = ()
    waits: bool = False
    is_planned: bool = False

    def __str__(self) -> str:
        return self.name


KILLED = "killed"
"""First word of a training that is killed once it has saved a checkpoint."""

SAMPLED = float("inf")
"""Tolerance of runs that sample completions: other rounding leads to other tokens."""

_TABLE = yaml.safe_load(Path(__file__).with_name("cells.yaml").read_text("utf-8"))
TASKS: dict[str, str] = _TABLE["tasks"]


def _fill(line: str) -> str:
    """Replace `<name>` by the flags of that name."""
    names = _TABLE["common"] | TASKS
    while (filled := re.sub(r"<([\w-]+)>", lambda match: names[match[1]], line)) != line:
        line = filled
    return line


STEP, SHORT = _fill("<step>"), _fill("<short>")
METHODS = {"lora": "--method lora", "qlora": "--method qlora --quant 4bit", "full": "--method full"}


def build_cells() -> Iterator[Cell]:
    """Yield all cells."""
    yield from _task_cells()
    yield from _method_cells()
    for group, cells in _TABLE["cells"].items():
        for name, values in cells.items():
            settings = dict(values) if isinstance(values, dict) else {"lines": values}
            lines = settings.pop("lines")
            otherwise = tuple(map(tuple, settings.pop("otherwise", ())))
            yield Cell(
                f"{group}/{name}",
                tuple(map(_fill, [lines] if isinstance(lines, str) else lines)),
                otherwise=otherwise, **settings,
            )  # fmt: skip
    yield from _memory_cells()


def _task_cells() -> Iterator[Cell]:
    for (task, flags), (method, chosen) in itertools.product(TASKS.items(), METHODS.items()):
        # Cosine similarities of an untrained decoder are near 1, where scores are times 20.
        tolerance = {"rl": SAMPLED, "embedding-llama": 5e-2}.get(task, 2e-2)
        yield Cell(
            f"task/{task}-{method}", (f"train {chosen} {flags} {SHORT}",), tolerance=tolerance
        )
    for task in ("text", "class", "preference", "embedding", "tags"):
        yield Cell(
            f"task/{task}-float32",
            (f"train --method lora {TASKS[task]} {STEP} --dtype float32 --no-tf32",),
            tolerance=1e-4,
        )


_FLAGS = {
    "loftq": f"{SHORT} --quant 4bit", "pissa": f"{STEP} --dtype float32",
    "olora": f"{STEP} --dtype float32",
    "c3a": f"{SHORT} --set method.block_size=16",
    "linear-probe": f"{SHORT} --learning-rate 1e-3",
}  # fmt: skip
"""Flags of methods that need others than `SHORT`."""


def _method_cells() -> Iterator[Cell]:
    for name, info in METHOD_INFO.items():
        if name in ("lora", "qlora", "full", "experts", "shira"):  # shira: no sparse tensors here
            continue
        task = TASKS["class" if name == "linear-probe" else "text"]
        line = f"train {info.flags} {task} {_FLAGS.get(name, SHORT)}"
        # PEFT prunes adalora's ranks after each step, and solves boft's systems with a check.
        yield Cell(f"method/{name}", (line,), waits=name in ("adalora", "boft"))
    yield Cell("method/experts", (
        "train --method lora --set method.target_parameters=experts --model {mixtral} "
        f"--dataset {{sft}} {SHORT}",
    ))  # fmt: skip
    yield Cell(  # LLM.int8() looks for outliers among the values
        "method/qlora-8bit", (f"train --method qlora --quant 8bit {TASKS['text']} {SHORT}",),
        waits=True,
    )  # fmt: skip
    yield Cell(
        "method/dora-4bit", (f"train --method lora --dora --quant 4bit {TASKS['text']} {SHORT}",)
    )


def _memory_cells() -> Iterator[Cell]:
    """Yield runs of a model whose activations and weights are larger than constant overheads.

    Rows have one length and share no prefix, so that each step is the largest one, as in `plan`.
    """
    for name, flags in {
        "lora": "--method lora", "qlora": "--method qlora --quant 4bit", "full": "--method full",
        "checkpointing": "--method lora --gradient-checkpointing", "dora": "--method lora --dora",
        "adapter": "--method adapter", "prefix": "--method prefix",
        "no-fast": "--method lora --no-fast", "float32": "--method lora --dtype float32 --no-tf32",
    }.items():  # fmt: skip
        dtype = "" if "--dtype" in flags else " --dtype bfloat16"
        flags += f"{dtype} --per-device-train-batch-size 8 --set speed.verify=false"
        flags += (
            " --model {medium} --dataset {even} --validation-file {even_validation} --max-steps 3"
        )
        waits = name in ("no-fast",)
        yield Cell(f"memory/{name}", (
            f"train {flags} --logging-steps 1 --output-dir run", f"plan {flags} --json",
        ), is_planned=True, waits=waits)  # fmt: skip


SAMPLE = (
    "task/text-lora", "task/text-qlora", "task/preference-lora", "task/rl-lora",
    "task/embedding-lora", "task/tags-lora", "task/span-lora", "task/text-float32",
    "t4/text", "processes/two", "option/resume", "command/merge",
)  # fmt: skip
"""Cells that CI runs."""


def write_files(folder: Path) -> dict[str, str]:
    """Write the rows of every task; return name → path of the training file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, build in _ROWS.items():
        for suffix, first in (("", 0), ("_validation", 40)):
            path = folder / f"{name}{suffix}.jsonl"
            rows = [json.dumps(build(i)) for i in range(first, first + (40 if not first else 12))]
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")
            files[name + suffix] = str(path)
    rewards = folder / "rewards.py"
    rewards.write_text(
        "def length(completions, **_):\n    return [min(len(text), 20) / 20 for text in completions]\n"
    )
    files["rewards"] = str(rewards)
    return files


def _words(i: int, count: int) -> str:
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, count + 1))


def _rotated(i: int, count: int) -> str:
    return " ".join(WORDS[(i + k) % len(WORDS)] for k in range(count))


_ROWS: dict[str, Any] = {
    **{name: ROWS[name] for name in ("tags", "span", "mask", "class", "multi", "regression", "pair")},
    "sft": lambda i: {"prompt": f"Tell of {_words(i, 2 + i % 5)}:", "completion": _words(i + 3, 3 + i % 9)},
    "even": lambda i: {"prompt": f"{i + 10} {_rotated(i, 80)}:", "completion": _rotated(i // 8, 40)},
    "chat": lambda i: {"messages": [
        {"role": "user", "content": _words(i, 2 + i % 4)},
        {"role": "assistant", "content": _words(i + 1, 3 + i % 7)},
    ]},
    "summary": lambda i: {"text": _words(i, 12 + i % 8), "summary": _words(i, 3)},
    "preference": lambda i: {
        "prompt": f"Tell of {_words(i, 2 + i % 5)}:", "chosen": _words(i + 1, 3 + i % 6),
        "rejected": _words(i + 5, 2 + i % 8),
    },
    "kto": lambda i: {
        "prompt": f"Tell of {_words(i, 2 + i % 5)}:", "completion": _words(i + 1, 3 + i % 6),
        "label": bool(i % 2),
    },
    "rl": lambda i: {"prompt": f"Repeat {_words(i, 1 + i % 3)}:", "answer": WORDS[i % 8]},
    "pairs": lambda i: {"query": f"{_words(i, 3)} {i}", "positive": f"{_words(i, 6 + i % 9)} {i}"},
    "ranked": lambda i: {
        "query": f"{_words(i, 3)} {i}", "positive": f"{_words(i, 6)} {i}",
        "negative": f"{_words(i + 3, 8)} {i}",
    },
}  # fmt: skip
