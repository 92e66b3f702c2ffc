"""Every task trains on tiny models, is saved, reloaded and compared, and answers.

`train` itself proves what was saved: it loads the adapter into a fresh base and raises unless the
logits are equal and training moved them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import task_data
from ftlevel.config import TrainConfig
from ftlevel.engine.generate import generate
from ftlevel.engine.train import train

ModelDir = Callable[..., Path]

TASKS = {
    "tags": ("token-classification", {}),
    "span": ("question-answering", {"max_length": 48, "doc_stride": 12}),
    "span-v2": ("question-answering", {"max_length": 48, "doc_stride": 12}),
    "mask": ("masked-lm", {}),
    "class": ("text-classification", {}),
    "multi": ("text-classification", {}),
    "regression": ("text-classification", {}),
    "pair": ("translation", {"columns": {"source": "en", "target": "de"}}),
}

METRICS = {
    "tags": {"precision", "recall", "f1", "accuracy"},
    "span": {"exact_match", "f1"},
    "span-v2": {"exact_match", "f1"},
    "mask": {"pseudo_perplexity", "masked_accuracy"},
    "class": {"accuracy", "f1", "mcc"},
    "multi": {"micro_f1", "macro_f1", "subset_accuracy"},
    "regression": {"rmse", "pearson", "spearman"},
    "pair": {"perplexity", "token_accuracy", "chrf", "bleu"},
}

# The head that the base's checkpoint has: none for what is new, "mlm" for a masked language model.
CELLS = [
    ("tags", "bert", "mlm"),
    ("tags", "roberta", "mlm"),
    ("tags", "gpt2", None),
    ("tags", "llama", None),
    ("tags", "t5", None),
    ("span", "bert", "mlm"),
    ("span-v2", "deberta-v2", "mlm"),
    ("span", "gpt2", None),
    ("span", "llama", None),
    ("span", "t5", None),
    ("span", "bart", None),
    ("mask", "bert", "mlm"),
    ("mask", "modernbert", "mlm"),
    ("mask", "roberta", "seqcls"),
    ("mask", "distilbert", "seqcls"),
    ("multi", "bert", "mlm"),
    ("multi", "llama", None),
    ("multi", "bart", None),
    ("regression", "electra", "mlm"),
    ("regression", "gpt2", None),
    ("regression", "t5", None),
    ("pair", "t5", None),
    ("pair", "bart", None),
    ("pair", "llama", None),
    ("pair", "qwen2", None),
]


def configure(model: Path, data: Path, name: str, out: Path, **more: Any) -> TrainConfig:
    task, options = TASKS[name]
    return TrainConfig.model_validate(
        {
            "task": task,
            "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
            "data": {"dataset": str(data), **options},
            "train": {
                "max_steps": 3,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "max_new_tokens": 8,
                **more,
            },
            "output": {"dir": str(out)},
        }
    )


@pytest.mark.parametrize(("name", "family", "head"), CELLS)
def test_trains_saves_and_answers(
    name: str, family: str, head: str | None, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = task_data.write(tmp_path / "data", name)
    config = configure(tiny_model_dir(family, head), data, name, tmp_path / "run")
    result = train(config)
    summary = result.summary
    assert set(summary["metrics"]) == {"loss"} | METRICS[name]
    assert all(math.isfinite(value) for value in summary["metrics"].values())
    assert summary["headline"] in summary["metrics"]
    assert summary["proof"]["reload_difference"] <= 1e-4
    assert summary["proof"]["adapter_effect"] > 1e-3
    check_answer(name, tmp_path / "run", summary)


def check_answer(name: str, run: Path, summary: Any) -> None:
    """Ask the saved run from scratch."""
    prompt = {"mask": "the [MASK] of a [MASK]", "span": "What is the name?"}.get(
        name.partition("-")[0], "The file of Paris."
    )
    context = "string value. The name is parser 3. " * 8 if name.startswith("span") else None
    [answer], _ = generate(str(run), [prompt], context=context, max_new_tokens=5, device="cpu")
    if name == "tags":
        assert [word for word, _ in answer.tags] == ["The", "file", "of", "Paris", "."]
        assert {tag for _, tag in answer.tags} <= set(summary["data"]["labels"])
    elif name.startswith("span"):
        assert answer.text in (context or "") or answer.text == "(no answer)"
    elif name == "mask":
        assert "[MASK]" not in answer.text
        assert answer.text.startswith("the ")
        assert len(answer.scores) == 5
    elif name == "multi":
        above = [label for label, share in answer.scores.items() if share > 0.5]
        assert answer.text == (", ".join(above) or "(no label)")
        assert list(answer.scores) == ["x", "y", "z"]
    elif name == "regression":
        assert math.isfinite(float(answer.text))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("name", "family", "head", "overrides"),
    [
        ("tags", "bert", "mlm", NO_DROPOUT),
        ("span", "bert", "mlm", NO_DROPOUT),
        ("mask", "bert", "mlm", NO_DROPOUT),
        ("class", "bert", "mlm", NO_DROPOUT),
        ("multi", "bert", "mlm", NO_DROPOUT),
        ("regression", "bert", "mlm", NO_DROPOUT),
        ("pair", "llama", None, {}),
        ("pair", "t5", None, {"dropout_rate": 0.0}),
    ],
)
def test_accumulation_gives_one_curve(
    name: str,
    family: str,
    head: str | None,
    overrides: dict[str, Any],
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    data = task_data.write(tmp_path / "data", name, rows=24)
    model = tiny_model_dir(family, head, **overrides)
    curves = []
    for batch in (8, 2):
        out = tmp_path / str(batch)
        config = configure(
            model, data, name, out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            predict_with_generate=False,
        )  # fmt: skip
        train(config)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append([(r["loss"], r["grad_norm"]) for r in records if "loss" in r])
    assert len(curves[0]) == 3
    for whole, parts in zip(*curves, strict=True):
        assert parts == pytest.approx(whole, rel=2e-5)
