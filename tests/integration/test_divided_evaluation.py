"""Evaluation divided among processes: the metrics, records and texts of one process, bit by bit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ranks
import task_data
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.evaluation import scoring
from ftlevel.evaluation.intervals import ExampleRecord
from ftlevel.events import NullListener
from ftlevel.extras.preference.rows import ReferencedRows
from ftlevel.models.loading import silence_loggers
from ftlevel.training.build_trainer import create_evaluator
from ftlevel.training.model import load_training_model
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.processes import Processes, started_processes
from preference_runs import create_labeled_answer, create_pair
from run_files import ModelDir

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = task_data.WORDS


def _ranked_row(i: int) -> dict[str, Any]:
    documents = [f"{WORDS[(i + k) % 8]} " * (1 + k) for k in range(3)]
    return {"query": f"the {WORDS[i % 3]}", "documents": documents, "labels": [i % 2, 1 - i % 2, 0]}


def _pair_of_texts(i: int) -> dict[str, Any]:
    word = WORDS[i % 8]
    return {"anchor": f"the {word} {i}", "positive": f"a {word} of {i} " * (1 + i % 3)}


def _answer(i: int) -> dict[str, Any]:
    return {"prompt": f"the {WORDS[i % 8]} " * (1 + i % 3), "completion": f"{WORDS[i % 5]} {i}"}


ROWS = {**task_data.ROWS, "answer": _answer, "preference": create_pair, "ranked": _ranked_row,
        "judged": create_labeled_answer, "texts": _pair_of_texts}  # fmt: skip
BERT, LLAMA, T5 = ("bert", NO_DROPOUT), ("llama", {}), ("t5", {"dropout_rate": 0.0})
CASES: dict[str, tuple[str, tuple[str, dict[str, Any]], str, dict[str, Any]]] = {
    "text": ("text-generation", LLAMA, "answer", {}),
    "sampled text": ("text-generation", LLAMA, "answer", {"train": {"temperature": 0.7}}),
    "translation": ("translation", T5, "pair", {
        "data": {"columns": {"source": "en", "target": "de"}}}),
    "class": ("text-classification", BERT, "class", {}),
    "several labels": ("text-classification", BERT, "multi", {}),
    "number": ("text-classification", BERT, "regression", {}),
    "tags": ("token-classification", BERT, "tags", {}),
    "span": ("question-answering", BERT, "span-v2", {"data": {"max_length": 32, "doc_stride": 8}}),
    "mask": ("masked-lm", BERT, "mask", {}),
    "dpo": ("preference", LLAMA, "preference", {"preference": {"loss": "dpo"}}),
    "kto": ("preference", LLAMA, "judged", {"preference": {"loss": "kto"}}),
    "reward": ("reward", LLAMA, "preference", {}),
    "embedding": ("embedding", BERT, "texts", {}),
    "reranking": ("reranking", BERT, "ranked", {}),
}  # fmt: skip


def build_config(
    case: str, tiny_model_dir: ModelDir, folder: Path, **sections: dict[str, Any]
) -> TrainConfig:
    task, (family, overrides), name, own = CASES[case]
    for split, rows in (("train", range(16)), ("validation", range(16, 27))):
        lines = [json.dumps(ROWS[name](i)) + "\n" for i in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(tiny_model_dir(family, **overrides)), "dtype": "float32"},
        "data": {"dataset": str(folder)},
        "train": {"per_device_train_batch_size": 3, "max_steps": 2, "logging_steps": 1,
                  "max_new_tokens": 4, "max_generate_samples": 7,
                  "predict_with_generate": task in ("text-generation", "translation") or None},
    }  # fmt: skip
    for section, settings in [*own.items(), *sections.items()]:
        values[section] = {**values.get(section, {}), **settings}
    return TrainConfig.model_validate({"task": task, **values})


def divide(
    compute: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any], count: int = 3
) -> Sequence[Any]:
    """Return the results of `Processes.divide` by three processes, each exchanged as bytes."""
    parts = [pickle.loads(pickle.dumps(compute(items[rank::count]))) for rank in range(count)]
    return [parts[at % count][at // count] for at in range(len(items))]


def describe(record: ExampleRecord, labels: Sequence[str]) -> dict[int, Any]:
    return {row: (unit.loss, unit.targets, unit.meter.describe(labels))
            for row, unit in record.units.items()}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_divided_evaluation_equals_that_of_one_process(
    case: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    with silence_loggers():
        run = resolve(build_config(case, tiny_model_dir, tmp_path))
        model = load_training_model(run, NullListener()).model
    evaluator: Any = create_evaluator(run, Processes())
    if case in ("dpo", "kto"):
        values = evaluator.compute_likelihoods(model)
        divided = replace(evaluator, divide=divide).compute_likelihoods(model)
        assert np.array_equal(values, divided)
        evaluator = replace(evaluator, rows=ReferencedRows(evaluator.rows, values + 0.1))
    records = [ExampleRecord(run.objective) for _ in range(2)]
    expected = evaluator(model, records[0])
    assert len(expected) > 1
    assert replace(evaluator, divide=divide)(model, records[1]) == expected
    labels = run.data.info["labels"] or ()
    assert describe(records[0], labels) == describe(records[1], labels)
    assert records[0].written == records[1].written
    texts = evaluator.score_texts, evaluator.language
    draws = [record.resample(5, 0, *texts) for record in records]
    assert {name: list(values) for name, values in draws[0].items()} == {
        name: list(values) for name, values in draws[1].items()
    }


def _train_rank(config: TrainConfig, calls: Path) -> None:
    """Train, and write the rows of each batch that this process has evaluated to `calls`.RANK."""
    supervised_loss, rows = scoring.supervised_loss, []

    def count(head: Any, model: Any, objective: Any, batch: Any, observe: Any) -> Any:
        rows.append(len(batch["labels"]))
        return supervised_loss(head, model, objective, batch, observe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "supervised_loss", count)
        train(config)
    calls.with_suffix(f".{started_processes().world.rank}").write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "shard"), [
    ("text", "none"), ("text", "full"), ("text", "grads"), ("kto", "none"), ("embedding", "none"),
])  # fmt: skip
def test_two_processes_report_metrics_of_one(
    case: str, shard: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Metrics before the first step are equal; after it, weights differ in rounding."""
    size = 3 if shard == "none" else 4  # of 3 batches, sharded processes compute the last one twice
    settings = {"eval_on_start": True, "eval_steps": 2, "learning_rate": 1e-3,
                "per_device_eval_batch_size": size}  # fmt: skip
    logs, lines = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        config = build_config(
            case, tiny_model_dir, tmp_path, output={"dir": str(out)},
            train={**settings, "gradient_accumulation_steps": 3 - count,
                   "shard": shard if count == 2 else "none"},
            speed={"verify": False}, data={"cache": False},
        )  # fmt: skip
        processes = ranks.start(_train_rank, [(config, tmp_path / f"calls{count}")] * count)
        assert ranks.end(processes) == [0] * count
        records = map(json.loads, (out / "metrics.jsonl").open())
        logs.append([{k: v for k, v in record.items() if k.startswith("eval_")}
                     for record in records if "eval_loss" in record])  # fmt: skip
        lines.append([json.loads(line) for line in (out / "validation.jsonl").open()])
    assert logs[0][0] == logs[1][0]
    assert logs[1][1] == pytest.approx(logs[0][1], rel=1e-4)
    assert [line["row"] for line in lines[1]] == [line["row"] for line in lines[0]]
    assert len(lines[1]) == 11
    one, *two = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("calls*")))
    if case == "text":
        assert one == ([3, 3, 3, 2] if size == 3 else [4, 4, 3]) * 2
        assert two == ([[3, 3] * 2, [3, 2] * 2] if size == 3 else [[4, 3] * 2] * 2)
