"""Every kind of model reference × every PEFT task type, in tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import task_data
from ftlevel.cli.app import run

LABELS = 3
ROWS = 12


@dataclass(frozen=True)
class TaskType:
    """A task type of PEFT, or MLM, which has none.

    Attributes:
        task: as in `--task`.
        family: of the tiny model.
        head: which its base was saved with.
        auto_class: transformers' class of the adapted model.
        row: index → a row of data.
        prompt: flags of `generate`.
    """

    task: str
    family: str
    head: str | None
    auto_class: str
    row: Callable[[int], dict[str, Any]]
    prompt: tuple[str, ...] = ("--prompt", "the module of")


def _tagged(i: int) -> dict[str, Any]:
    words = ["The", task_data.WORDS[i % 8], "of", task_data.WORDS[i % 5]]
    return {"tokens": words, "tags": [f"LABEL_{(i + k) % LABELS}" for k in range(4)]}


def _pair(i: int) -> dict[str, Any]:
    return {"prompt": f"the {task_data.WORDS[i % 8]} is", "completion": f"a value {i}"}


TYPES = {
    "SEQ_CLS": TaskType(
        "text-classification", "bert", "seqcls", "AutoModelForSequenceClassification",
        lambda i: {"text": f"the {task_data.WORDS[i % 8]} {i}", "label": f"LABEL_{i % LABELS}"},
    ),
    "TOKEN_CLS": TaskType(
        "token-classification", "bert", "mlm", "AutoModelForTokenClassification", _tagged,
    ),
    "QUESTION_ANS": TaskType(
        "question-answering", "bert", "mlm", "AutoModelForQuestionAnswering",
        task_data.ROWS["span"],
        ("--prompt", "What is the name?", "--context", "The name is module 3."),
    ),
    "CAUSAL_LM": TaskType("text-generation", "qwen2", None, "AutoModelForCausalLM", _pair),
    "SEQ_2_SEQ_LM": TaskType("text-generation", "t5", None, "AutoModelForSeq2SeqLM", _pair),
    "MLM": TaskType(
        "masked-lm", "bert", "mlm", "AutoModelForMaskedLM", task_data.ROWS["mask"],
        ("--prompt", "the [MASK] of"),
    ),
}  # fmt: skip
THINGS = ("run", "checkpoint", "adapter", "peft", "merged", "quantized")
"""What a name can refer to; `peft` is an adapter that plain PEFT saved."""


def write_peft(kind: str, base: Path, folder: Path) -> Path:
    """Save an adapter of random values by plain PEFT, with a head of three labels where new."""
    own = TYPES[kind]
    torch.manual_seed(0)
    labels = {"num_labels": LABELS, "ignore_mismatched_sizes": True} if "_CLS" in kind else {}
    model = getattr(transformers, own.auto_class).from_pretrained(
        base, dtype=torch.float32, **labels
    )
    settings = {} if kind == "MLM" else {"task_type": kind}
    targets = {"bert": ["query", "value"], "t5": ["q", "v"]}.get(own.family, ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def load_peft(kind: str, adapter: Path, base: Path) -> Any:
    """Load the adapter of `write_peft` by plain PEFT."""
    own = TYPES[kind]
    labels = {"num_labels": LABELS, "ignore_mismatched_sizes": True} if "_CLS" in kind else {}
    model = getattr(transformers, own.auto_class).from_pretrained(
        base, dtype=torch.float32, **labels
    )
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def make_things(kind: str, base: Path, folder: Path) -> dict[str, Path]:
    """Make one of each of `THINGS` in `folder`, with `rows.jsonl`, and `asked.jsonl` to predict."""
    own = TYPES[kind]
    rows = folder / "rows.jsonl"
    folder.mkdir(parents=True)
    rows.write_text("\n".join(json.dumps(own.row(i)) for i in range(ROWS)))
    masked = {"text": "the [MASK] of"} if kind == "MLM" else {}
    asked = [json.dumps(own.row(i) | masked) for i in range(3)]
    (folder / "asked.jsonl").write_text("\n".join(asked))
    made = {name: folder / name for name in THINGS}
    made["checkpoint"] = folder / "run/checkpoints/checkpoint-2"
    commands = (
        ["train", "--method", "lora", "--model", base, "--dataset", rows, "--task", own.task,
         "--max-steps", "2", "--save-steps", "2", "--output-dir", made["run"],
         "--dtype", "float32"],
        ["merge", made["run"], "--out", made["merged"]],
        ["quantize", made["merged"], "--quant", "4bit", "--out", made["quantized"],
         "--no-measure"],
    )  # fmt: skip
    for command in commands:
        assert run([*map(str, command), "--quiet"]) == 0, command
    shutil.copytree(made["run"] / "adapter", made["adapter"])
    write_peft(kind, base, made["peft"])
    return made
