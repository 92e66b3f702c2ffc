"""Tiny models of every kind of model reference and every PEFT task type."""

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
    """A task type of PEFT, or MLM, which has no task type in PEFT.

    Attributes:
        task: as in `--task`.
        family: of the tiny model.
        head: of the saved base.
        auto_class: transformers' class of the adapted model.
        row: function of an index that returns a row of data.
        prompt: flags of `generate`.
    """

    task: str
    family: str
    head: str | None
    auto_class: str
    row: Callable[[int], dict[str, Any]]
    prompt: tuple[str, ...] = ("--prompt", "the module of")


def _tagged_row(i: int) -> dict[str, Any]:
    words = ["The", task_data.WORDS[i % 8], "of", task_data.WORDS[i % 5]]
    return {"tokens": words, "tags": [f"LABEL_{(i + k) % LABELS}" for k in range(4)]}


def _pair_row(i: int) -> dict[str, Any]:
    return {"prompt": f"the {task_data.WORDS[i % 8]} is", "completion": f"a value {i}"}


TYPES = {
    "SEQ_CLS": TaskType(
        "text-classification", "bert", "seqcls", "AutoModelForSequenceClassification",
        lambda i: {"text": f"the {task_data.WORDS[i % 8]} {i}", "label": f"LABEL_{i % LABELS}"},
    ),
    "TOKEN_CLS": TaskType(
        "token-classification", "bert", "mlm", "AutoModelForTokenClassification", _tagged_row,
    ),
    "QUESTION_ANS": TaskType(
        "question-answering", "bert", "mlm", "AutoModelForQuestionAnswering",
        task_data.ROWS["span"],
        ("--prompt", "What is the name?", "--context", "The name is module 3."),
    ),
    "CAUSAL_LM": TaskType("text-generation", "qwen2", None, "AutoModelForCausalLM", _pair_row),
    "SEQ_2_SEQ_LM": TaskType("text-generation", "t5", None, "AutoModelForSeq2SeqLM", _pair_row),
    "MLM": TaskType(
        "masked-lm", "bert", "mlm", "AutoModelForMaskedLM", task_data.ROWS["mask"],
        ("--prompt", "the [MASK] of"),
    ),
}  # fmt: skip
REF_KINDS = ("run", "checkpoint", "adapter", "peft", "merged", "quantized")
"""Kinds of model references; `peft` is an adapter saved by plain PEFT."""


def save_peft_adapter(kind: str, base: Path, folder: Path) -> Path:
    """Save an adapter of random values with plain PEFT, with three labels if the head is new."""
    task_type = TYPES[kind]
    torch.manual_seed(0)
    labels = {"num_labels": LABELS, "ignore_mismatched_sizes": True} if "_CLS" in kind else {}
    model = getattr(transformers, task_type.auto_class).from_pretrained(
        base, dtype=torch.float32, **labels
    )
    task_fields = {} if kind == "MLM" else {"task_type": kind}
    targets = {"bert": ["query", "value"], "t5": ["q", "v"]}.get(
        task_type.family, ["q_proj", "v_proj"]
    )
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **task_fields)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def load_peft_model(kind: str, adapter: Path, base: Path) -> Any:
    """Load the adapter of `save_peft_adapter` with plain PEFT."""
    task_type = TYPES[kind]
    labels = {"num_labels": LABELS, "ignore_mismatched_sizes": True} if "_CLS" in kind else {}
    model = getattr(transformers, task_type.auto_class).from_pretrained(
        base, dtype=torch.float32, **labels
    )
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def create_refs(kind: str, base: Path, folder: Path) -> dict[str, Path]:
    """Create one reference of each kind in `folder`, with rows.jsonl and asked.jsonl (new rows)."""
    task_type = TYPES[kind]
    rows = folder / "rows.jsonl"
    folder.mkdir(parents=True)
    rows.write_text("\n".join(json.dumps(task_type.row(i)) for i in range(ROWS)))
    mask_text = {"text": "the [MASK] of"} if kind == "MLM" else {}
    new_rows = [json.dumps(task_type.row(i) | mask_text) for i in range(3)]
    (folder / "asked.jsonl").write_text("\n".join(new_rows))
    paths = {name: folder / name for name in REF_KINDS}
    paths["checkpoint"] = folder / "run/checkpoints/checkpoint-2"
    commands = (
        ["train", "--method", "lora", "--model", base, "--dataset", rows, "--task", task_type.task,
         "--max-steps", "2", "--save-steps", "2", "--output-dir", paths["run"],
         "--dtype", "float32"],
        ["merge", paths["run"], "--out", paths["merged"]],
        ["quantize", paths["merged"], "--quant", "4bit", "--out", paths["quantized"],
         "--no-measure"],
    )  # fmt: skip
    for command in commands:
        assert run([*map(str, command), "--quiet"]) == 0, command
    shutil.copytree(paths["run"] / "adapter", paths["adapter"])
    save_peft_adapter(kind, base, paths["peft"])
    return paths
