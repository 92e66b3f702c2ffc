"""Embedding models: training, saving, evaluation, merging, and any micro-batch split."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import bootstrap
from transformers import AutoModel, AutoTokenizer

import ranks
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.commands.preview import preview
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, MergeConfig, ModelConfig, PredictConfig, TrainConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.extras.retrieval.embedding_losses import STEP_LOSSES, LossConfig
from ftlevel.extras.retrieval.rows import StepTexts
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat, save_embedding_format
from sampling import every

ModelDir = Callable[..., Path]
_NAMES = ("cat", "dog", "house", "tree", "river", "stone", "bird", "fish")
_WORDS = ("old", "new", "red", "big")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 32 training pairs and 8 validation pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "anchor": f"the {word} {name}",
            "positive": f"a {name} that is {word} and more " * (1 + i % 3),
        }
        for i, (name, word) in enumerate((n, w) for n in _NAMES for w in _WORDS)
    ]
    write_rows(folder / "train.jsonl", rows)
    validation_rows = [
        {name: text.replace(" ", " very ", 1) for name, text in row.items()} for row in rows
    ]
    write_rows(folder / "validation.jsonl", validation_rows[::4])
    return folder


def create_config(model: Path, data: Path, out: Path, **overrides: Any) -> TrainConfig:
    sections: dict[str, Any] = {
        "task": "embedding",
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(data)},
        "train": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        "output": {"dir": out},
    }
    for name, override in overrides.items():
        default = sections.get(name)
        is_section = isinstance(default, dict) and isinstance(override, dict)
        sections[name] = {**default, **override} if is_section else override  # type: ignore[dict-item]
    return TrainConfig(**sections)


CELLS = [
    pytest.param("bert", "mlm", "lora", marks=pytest.mark.sweep),
    ("bert", "mlm", "full"),
    pytest.param("roberta", "mlm", "lora", marks=pytest.mark.sweep),
    pytest.param("distilbert", "mlm", "lora", marks=pytest.mark.sweep),
    ("modernbert", "mlm", "lora"),
    ("llama", None, "lora"),
    ("qwen3", None, "full"),
    ("bert", "mlm", "prompt-tuning"),
    ("llama", None, "prefix-tuning"),
    pytest.param("llama", None, "ia3", marks=pytest.mark.sweep),
    ("llama", None, "qlora"),
    ("bert", "mlm", "qlora"),  # without a pooler in the checkpoint
]


@pytest.mark.parametrize(("family", "head", "method"), CELLS)
def test_evaluation_matches_metrics_of_training(
    family: str,
    head: str | None,
    method: str,
    pairs: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    config = create_config(tiny_model_dir(family, head), pairs, out, method={"kind": method})
    summary = train(config).summary
    assert set(summary["metrics"]) >= {"loss", "ndcg@10", "mrr@10", "recall@10", "map@100"}
    evaluation = evaluate(EvaluateConfig(name=str(out), resamples=0, base=False, device="cpu"))
    assert evaluation.metrics["ndcg@10"] == pytest.approx(summary["metrics"]["ndcg@10"], abs=1e-6)
    assert evaluation.metrics["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert (out / "adapter" / "modules.json").is_file()


def load_adapter(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def max_difference(first_run: Path, second_run: Path) -> float:
    first, second = load_adapter(first_run), load_adapter(second_run)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPLITS: dict[str, dict[str, Any]] = {
    "accumulated": {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}},
    "cached": {"speed": {"tokens_per_micro_batch": 32}, "embedding": {"grad_cache": "always"}},
    "kept": {"speed": {"tokens_per_micro_batch": 32}, "embedding": {"grad_cache": "never"}},
    "plain": {"speed": {"fast": False}},
}


@pytest.mark.parametrize(
    ("loss", "splits"),
    [
        ("mnrl", tuple(SPLITS)),
        ("cosent", ("cached",)),
        pytest.param("cosent", tuple(SPLITS), marks=pytest.mark.sweep),
    ],
)
def test_weights_do_not_depend_on_micro_batch_split(
    loss: str, splits: tuple[str, ...], pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model, data = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), pairs
    if loss == "cosent":
        rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
        scored = [
            {"sentence1": row["anchor"], "sentence2": row["positive"], "score": i % 5 / 4}
            for i, row in enumerate(rows)
        ]
        data = write_rows(tmp_path / "scored.jsonl", scored)
    # AdamW would turn the rounding error of a gradient near zero into a full step.
    optimizer = {"optim": "sgd", "learning_rate": 0.5}
    train(create_config(model, data, tmp_path / "whole", train=optimizer))
    adapter = load_adapter(tmp_path / "whole")
    assert max(float(adapter[name].abs().max()) for name in adapter if "lora_B" in name) > 1e-3
    for name in splits:
        split = SPLITS[name]
        overrides = {**split, "train": {**optimizer, **split.get("train", {})}}
        train(create_config(model, data, tmp_path / name, **overrides))
        assert max_difference(tmp_path / "whole", tmp_path / name) < 1e-6, name


def _train_rank(model: Path, data: Path, out: Path, options: dict[str, Any]) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 4}
    speed = {"tokens_per_micro_batch": 48}
    train(create_config(model, data, out, train=settings, speed=speed, **options))


@pytest.mark.parametrize("documents", [32, 3])
def test_two_processes_match_one_process(
    documents: int, pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Two processes of 4 rows each take the steps of one process with 8.

    With 3 documents, each is the positive of rows in both processes, and not a negative of them.
    """
    model = tiny_model_dir("bert", "mlm", **_NO_DROPOUT)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    rows = [{**row, "positive": rows[i % documents]["positive"]} for i, row in enumerate(rows)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train(
        create_config(model, data, tmp_path / "one", train={"optim": "sgd", "learning_rate": 0.5})
    )
    processes = ranks.start(_train_rank, [(model, data, tmp_path / "two", {})] * 2)
    assert ranks.end(processes) == [0, 0]
    assert max_difference(tmp_path / "one", tmp_path / "two") < 1e-6


@pytest.fixture(scope="module")
def dataset_files(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of 13 and 6 rows; the label of a positive is 1 in one and 2 in the other."""
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    folder, files = tmp_path_factory.mktemp("sets"), []
    for label, dataset_rows in ((1, rows[:13]), (2, rows[13:19])):
        records = [
            {"query": row["anchor"], "documents": [row["positive"]], "labels": [label]}
            for row in dataset_rows
        ]
        files.append(str(write_rows(folder / f"set{label}.jsonl", records)))
    return files


def _train_sets(model: Path, files: list[str], out: Path, batch: int, accumulated: int) -> None:
    """Train two epochs, and write the labels of each step's positives to OUT.RANK.json."""
    step_labels: list[list[float]] = []
    mnrl = STEP_LOSSES["mnrl"]

    def record(vectors: torch.Tensor, step: StepTexts, options: LossConfig) -> torch.Tensor:
        step_labels.append([label for labels in step.labels for label in labels])
        return mnrl(vectors, step, options)

    train_settings = {
        "max_steps": None,
        "num_train_epochs": 2,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STEP_LOSSES, "mnrl", record)
        overrides = {"train": train_settings, "speed": {"verify": False}}
        config = create_config(model, Path(files[0]), out, **overrides)
        data_config = config.data.model_copy(update={"also": tuple(files[1:])})
        train(config.with_sections(data=data_config))
    out.with_suffix(f".{os.environ.get('RANK', 0)}.json").write_text(json.dumps(step_labels))


def test_each_step_has_rows_of_one_dataset(
    dataset_files: list[str], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """In steps of 4, 13 and 6 rows are 4 and 2 steps, also accumulated and in two processes."""
    model = tiny_model_dir("bert", "mlm", **_NO_DROPOUT)
    _train_sets(model, dataset_files, tmp_path / "one", 4, 1)
    _train_sets(model, dataset_files, tmp_path / "accumulated", 1, 4)
    processes = ranks.start(_train_sets, [(model, dataset_files, tmp_path / "two", 2, 1)] * 2)
    assert ranks.end(processes) == [0, 0]
    steps = json.loads((tmp_path / "one.0.json").read_text())
    assert len(steps) == 2 * (4 + 2)
    assert all(len(set(labels)) == 1 for labels in steps)
    for epoch in (steps[:6], steps[6:]):
        assert sorted(map(len, epoch)) == [1, 2, 4, 4, 4, 4]
    assert steps[:6] != steps[6:]
    for name in ("accumulated.0", "two.0", "two.1"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == steps, name
    for name in ("accumulated", "two"):
        assert max_difference(tmp_path / "one", tmp_path / name) < 1e-6, name


def test_grad_cache_replays_dropout(pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """Dropout of BERT and LoRA is the same with and without gradient caching."""
    model = tiny_model_dir("bert", "mlm")
    small, method = {"tokens_per_micro_batch": 48}, {"kind": "lora", "lora_dropout": 0.2}
    for grad_cache in ("always", "never"):
        train(create_config(model, pairs, tmp_path / grad_cache, speed=small, method=method,
                            embedding={"grad_cache": grad_cache}))  # fmt: skip
    assert max_difference(tmp_path / "always", tmp_path / "never") == 0


def test_resumed_run_matches_uninterrupted_run(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = tiny_model_dir("bert", "mlm")
    train(create_config(model, pairs, tmp_path / "whole", train={"max_steps": 6}))
    checkpointing = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}

    class Stop(Exception):
        """Ends the run."""

    from transformers import TrainerCallback

    class StopAt4(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise Stop

    with pytest.raises(Stop):
        train(
            create_config(model, pairs, tmp_path / "half", train=checkpointing),
            callbacks=[StopAt4()],
        )
    output = {"dir": tmp_path / "half", "resume": True}
    train(create_config(model, pairs, tmp_path / "half", train=checkpointing, output=output))
    assert max_difference(tmp_path / "whole", tmp_path / "half") == 0


def test_merged_model_has_metrics_of_adapter(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The checkpoint has no pooler; embeddings do not depend on it."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    train(create_config(tiny_model_dir("bert", "mlm"), pairs, out))
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    assert (merged / "modules.json").is_file()
    evaluations = [
        evaluate(
            EvaluateConfig(
                name=str(name), dataset=str(pairs), resamples=0, base=False, device="cpu"
            )
        )
        for name in (out, merged)
    ]
    assert evaluations[0].metrics == pytest.approx(evaluations[1].metrics, abs=1e-5)


INVALID_INPUTS: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "one column": ([{"anchor": "a cat"}] * 4, [], "no format matches the columns"),
    "equal labels": (
        [{"sentence1": f"a cat {i}", "sentence2": "a dog", "score": 1} for i in range(4)],
        [],
        "the label of all 4 rows is 1",
    ),
    "positive is query": (
        [{"anchor": f"a cat {i}", "positive": f"a cat {i}"} for i in range(4)],
        [],
        "the positive of every row equals its query",
    ),
    "one document": (
        [{"anchor": f"a cat {i}", "positive": "a dog"} for i in range(4)],
        [],
        "and the data has one document",
    ),
    "one query": (
        [{"anchor": "a cat", "positive": f"a dog {i}"} for i in range(4)],
        [],
        "and the data has one query. Use rows with several.",
    ),
    "no relevant document": (
        [{"query": f"a cat {i}", "documents": ["a dog"], "labels": [i % 2]} for i in range(4)],
        [],
        "rows.jsonl:1: no document has a label above 0, as in 2 of 4 rows",
    ),
    "unknown pooling": ([], ["--pooling", "median"], "median"),
    "too many dimensions": ([], ["--matryoshka-dims", "128,64"], "128: embeddings of"),
    "batch size 1": (
        [],
        ["--per-device-train-batch-size", "1"],
        "--per-device-train-batch-size 1: --loss mnrl",
    ),
    "unsupported loss": ([], ["--loss", "cosent"], "--loss cosent needs scores"),
    "margin of other loss": (
        [],
        ["--margin", "1"],
        "--margin has no effect with --loss mnrl: it is for gist, triplet, contrastive. Drop it.",
    ),
    "settings of other loss": (
        [{"sentence1": f"a cat {i}", "sentence2": "a dog", "score": i} for i in range(4)],
        ["--symmetric"],
        "--symmetric has no effect with --loss cosent: it is for mnrl. Drop it.",
    ),
    "score out of range": (
        [{"sentence1": f"a cat {i}", "sentence2": "a dog", "score": i} for i in range(4)],
        ["--loss", "cosine"],
        "rows.jsonl:3: the score is 2, and --loss cosine needs scores from -1 to 1",
    ),
    "no negatives": ([], ["--loss", "triplet"], "needs a negative in every row"),
    "no guide": ([], ["--loss", "gist"], "Add --guide MODEL"),
    "loss of other task": ([], ["--loss", "dpo"], "dpo"),
}


@pytest.mark.parametrize("case", INVALID_INPUTS)
def test_invalid_input_is_reported_before_loading(
    case: str,
    pairs: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, flags, expected = INVALID_INPUTS[case]
    data = write_rows(tmp_path / "rows.jsonl", rows) if rows else pairs
    monkeypatch.setattr(
        "ftlevel.training.model.load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    arguments = ["train", "--task", "embedding", "--model", str(tiny_model_dir("bert", "mlm")),
                 "--dataset", str(data), "--output-dir", str(tmp_path / "run"),
                 "--device", "cpu"]  # fmt: skip
    assert run([*arguments, *flags]) == 2
    messages = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("ftlevel:")
    ]
    assert len(messages) == 1
    assert expected in messages[0]


def test_last_token_pooling_without_eos_raises(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama", None, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    with pytest.raises(ConfigError, match="has no EOS token"):
        train(create_config(model, pairs, tmp_path / "run"))


@pytest.fixture(scope="module")
def triplets(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 16 rows with a negative."""
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    records = [
        {**row, "negative": rows[(i + 5) % len(rows)]["positive"]}
        for i, row in enumerate(rows[:16])
    ]
    return write_rows(tmp_path_factory.mktemp("triplets") / "rows.jsonl", records)


def test_guide_and_teacher_may_have_another_tokenizer(
    triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """GIST encodes every text with the guide; kl learns the teacher's distribution.

    A teacher that was trained on short texts reads longer ones whole.
    """
    model, teacher = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), tiny_model_dir("roberta", "mlm")
    guided = {"loss": "gist", "guide": str(teacher)}
    gist_summary = train(
        create_config(model, triplets, tmp_path / "gist", embedding=guided)
    ).summary
    assert gist_summary["loss_first"] > 0
    other_teacher = {"distillation": {"teacher": str(teacher)}, "embedding": {"loss": "kl"}}
    other_summary = train(
        create_config(model, triplets, tmp_path / "other", **other_teacher)
    ).summary
    short = [{"anchor": f"cat {i}", "positive": f"dog {i}"} for i in range(4)]
    short_data, short_run = write_rows(tmp_path / "short.jsonl", short), tmp_path / "short"
    unchanged = {"max_steps": 1, "learning_rate": 1e-9}
    train(create_config(model, short_data, short_run, train=unchanged))
    for same in (model, short_run):  # the model is its own teacher
        same_teacher = {"distillation": {"teacher": str(same)}, "embedding": {"loss": "kl"}}
        config = create_config(model, triplets, tmp_path / f"of-{same.name}", **same_teacher)
        assert train(config).summary["loss_first"] == pytest.approx(0, abs=1e-6)
    assert other_summary["loss_first"] > 1e-6


@pytest.mark.parametrize("flag", ["guide", "teacher", "reranker"])
def test_two_processes_with_guide_or_teacher_match_one_process(
    flag: str, triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Each process runs the guide or the teacher on half of the texts."""
    model, other = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), tiny_model_dir("roberta", "mlm")
    reranker = tiny_model_dir("roberta", "seqcls", num_labels=1)
    options: dict[str, Any] = {
        "guide": {"embedding": {"loss": "gist", "guide": str(other)}},
        "teacher": {"distillation": {"teacher": str(other)}, "embedding": {"loss": "kl"}},
        "reranker": {"distillation": {"teacher": str(reranker)},
                     "embedding": {"loss": "margin-mse"}},
    }[flag]  # fmt: skip
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    train(create_config(model, triplets, tmp_path / "one", train=sgd, **options))
    processes = ranks.start(_train_rank, [(model, triplets, tmp_path / "two", options)] * 2)
    assert ranks.end(processes) == [0, 0]
    assert max_difference(tmp_path / "one", tmp_path / "two") < 1e-6


def test_margin_mse_loss_with_reranker_teacher_matches_reference(
    triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """margin-mse learns the margins of the scores that `predict` returns."""
    rows = [json.loads(line) for line in triplets.open(encoding="utf-8")][:8]
    listed_rows = [
        {"query": r["anchor"], "documents": [r["positive"], r["negative"]], "labels": [1, 0]}
        for r in rows
    ]
    reranker = tmp_path / "reranker"
    teacher = create_config(
        tiny_model_dir("bert", "mlm"), write_rows(tmp_path / "listed.jsonl", listed_rows), reranker
    )
    train(teacher.with_sections(task="reranking"))
    candidates = [{name: row[name] for name in ("query", "documents")} for row in listed_rows]
    scored = predict(PredictConfig(name=str(reranker), device="cpu"), candidates).rows or []
    model, data = (
        tiny_model_dir("bert", "mlm", **_NO_DROPOUT),
        write_rows(tmp_path / "r.jsonl", rows),
    )
    overrides = {"distillation": {"teacher": str(reranker)}, "embedding": {"loss": "margin-mse"}}
    summary = train(
        create_config(model, data, tmp_path / "run", train={"max_steps": 1}, **overrides)
    ).summary
    texts = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    query, positive, negative = (reference_embeddings(model, column, "") for column in texts)
    margins = (query * positive).sum(1) - (query * negative).sum(1)
    teacher_margins = torch.tensor([row["prediction"][0] - row["prediction"][1] for row in scored])
    assert summary["loss_first"] == pytest.approx(
        float((margins - teacher_margins).square().mean()), rel=1e-4
    )


def test_matryoshka_metrics_are_reported_per_dimension(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"matryoshka_dims": [64, 16]}
    config = create_config(
        tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run", embedding=settings
    )
    metrics = train(config).summary["metrics"]
    assert metrics["ndcg@10_dim_64"] == metrics["ndcg@10"]
    assert "ndcg@10_dim_16" in metrics


def test_long_texts_raise_or_are_truncated(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    config = create_config(tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run")
    short = config.data.model_copy(update={"max_length": 12})
    with pytest.raises(FtlevelError, match="longer than 12 tokens"):
        train(config.with_sections(data=short))
    truncated = short.model_copy(update={"overlong": "truncate"})
    without_texts = truncated.model_copy(update={"max_length": 2})  # of [CLS] and [SEP]
    with pytest.raises(FtlevelError, match="training rows have the same tokens"):
        train(config.with_sections(data=without_texts))
    summary = train(config.with_sections(data=truncated)).summary
    assert summary["data"]["shortened"] > 0
    run_dir, merged = tmp_path / "run", tmp_path / "merged"
    merge(MergeConfig(adapters=[str(run_dir)], output_dir=merged, verify=False))
    texts = ["the old house is new and red and big " * count for count in (1, 3, 80)]
    expected = reference_embeddings(merged, texts, "", max_length=12)
    for name in (run_dir, merged):
        predictions = predict(PredictConfig(name=str(name)), [{"text": t} for t in texts]).rows
        vectors = torch.stack([torch.as_tensor(row["prediction"]) for row in predictions or []])
        assert torch.allclose(vectors, expected, atol=1e-5)
    for folder in (run_dir / "adapter", merged):
        lengths = json.loads((folder / "sentence_bert_config.json").read_text())
        assert lengths["max_seq_length"] == 12
    with pytest.raises(FtlevelError, match=r"model allows 12 \(--overlong truncate cuts it\)"):
        predict(PredictConfig(name=str(merged), overlong="error"), [{"text": texts[1]}])


def test_preview_labels_query_and_document_tokens(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"query_prompt": "query: "}
    config = create_config(
        tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run", embedding=settings
    )
    (row,) = preview(config, [1]).rows
    assert "query: tokens 1-" in row.label
    assert "document with label 1: tokens" in row.label
    assert [token.label for token in row.tokens if token.label] == ["query, prompt", "document 1"]


def test_continued_training_keeps_pooling_and_prompts(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"pooling": "cls", "normalize": False, "query_prompt": "find: "}
    model = tiny_model_dir("bert", "mlm")
    train(create_config(model, pairs, tmp_path / "first", embedding=settings))
    adapter = {"adapter": str(tmp_path / "first"), "device": "cpu"}
    config = create_config(model, pairs, tmp_path / "second").with_sections(
        model=ModelConfig(**adapter)
    )
    train(config)
    options = [
        json.loads((tmp_path / name / "adapter" / "ftlevel.json").read_text())["options"]
        for name in ("first", "second")
    ]
    assert options[0]["embedding"]["form"] == options[1]["embedding"]["form"]
    assert options[1]["embedding"]["form"]["query_prompt"] == "find: "
    # Without --task, the run's task decides what --loss sets.
    for name in ("first", "first/adapter"):
        command = ["train", "--adapter", str(tmp_path / name), "--loss", "infonce", "--scale", "9"]
        assert run([*command, "--dataset", str(pairs), "--device", "cpu", "--dry-run"]) == 0


def reference_embeddings(
    model: Path, texts: list[str], prompt: str, max_length: int = 512
) -> torch.Tensor:
    """Return normalized mean embeddings without the prompt's tokens, one text at a time."""
    cut = {"truncation": True, "max_length": max_length}
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    skipped = len(tokenizer(prompt)["input_ids"]) - 1 if prompt else 0
    embeddings = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(prompt + text, return_tensors="pt", **cut)
            states = network(**inputs).last_hidden_state[0]
            embeddings.append(torch.nn.functional.normalize(states[skipped:].mean(0), dim=0))
    return torch.stack(embeddings)


def test_prompt_tokens_are_excluded_from_pooling(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """`include_prompt: false` applies to training, prediction and saved files."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("bert", "mlm", **_NO_DROPOUT), model)
    form = EmbeddingFormat("mean", True, query_prompt="the old house: ", include_prompt=False)
    save_embedding_format(model, form, 64)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")][:8]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    summary = train(create_config(model, data, tmp_path / "run", train={"max_steps": 1})).summary
    queries, documents = [r["anchor"] for r in rows], [r["positive"] for r in rows]
    scores = (
        20
        * reference_embeddings(model, queries, form.query_prompt)
        @ reference_embeddings(model, documents, "").T
    )
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(8))
    assert summary["loss_first"] == pytest.approx(float(expected), abs=1e-5)
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=merged, device="cpu"))
    for name in (tmp_path / "run/adapter", merged):
        assert json.loads((name / "1_Pooling/config.json").read_text())["include_prompt"] is False
    settings = {"device": "cpu", "columns": {"query": "anchor"}, "ignore_columns": ("positive",)}
    predictions = predict(PredictConfig(name=str(merged), **settings), rows).rows or []
    vectors = torch.stack([torch.as_tensor(row["prediction"]) for row in predictions])
    assert torch.allclose(
        vectors, reference_embeddings(merged, queries, form.query_prompt), atol=1e-6
    )
    continued = create_config(model, data, tmp_path / "more", train={"max_steps": 1}).with_sections(
        model=ModelConfig(adapter=str(tmp_path / "run"), device="cpu")
    )
    train(continued)
    card = json.loads((tmp_path / "more/adapter/ftlevel.json").read_text())
    assert card["options"]["embedding"]["form"]["include_prompt"] is False
    # A prompt as long as the maximum length leaves the last token.
    save_embedding_format(model, replace(form, max_length=3), 64)
    config = PredictConfig(name=str(model), task="embedding", overlong="truncate", **settings)
    vectors = torch.stack([torch.as_tensor(r["prediction"]) for r in predict(config, rows).rows])
    assert vectors.norm(dim=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("flag", ["guide", "teacher"])
def test_resume_with_changed_guide_or_teacher_raises(
    flag: str, triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The model's directory may change, but not its weights or pooling."""
    auxiliary_model = tmp_path / "other"
    shutil.copytree(tiny_model_dir("roberta", "mlm"), auxiliary_model)
    overrides: dict[str, Any] = {"embedding": {"loss": "gist", "guide": str(auxiliary_model)}}
    if flag == "teacher":
        overrides = {"embedding": {"loss": "kl"}, "distillation": {"teacher": str(auxiliary_model)}}
    checkpointing = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    model, out = tiny_model_dir("bert", "mlm"), tmp_path / "run"
    train(create_config(model, triplets, out, train=checkpointing, **overrides))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    resume_output = {"dir": out, "resume": True}
    save_embedding_format(auxiliary_model, EmbeddingFormat("cls", normalize=True), 64)
    with pytest.raises(ConfigError, match=f"{flag} was"):
        train(
            create_config(
                model, triplets, out, train=checkpointing, output=resume_output, **overrides
            )
        )
    for path in (
        auxiliary_model / "modules.json",
        auxiliary_model / "config_sentence_transformers.json",
    ):
        path.unlink()
    moved = auxiliary_model.rename(tmp_path / "moved")
    section = "distillation" if flag == "teacher" else "embedding"
    overrides = {**overrides, section: {**overrides[section], flag: str(moved)}}
    train(
        create_config(model, triplets, out, train=checkpointing, output=resume_output, **overrides)
    )


def get_grades(query: int) -> dict[int, int]:
    """Return the grades of the documents that are relevant to a query of `beir_dir`."""
    return {4 * query: 3, 32 + query: 1}


@pytest.fixture(scope="module")
def beir_dir(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR directory of 8 queries, each with documents of grades 3 and 1 out of 40."""
    folder = tmp_path_factory.mktemp("beir")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    query_rows = [json.loads(line) for line in (pairs / "validation.jsonl").open(encoding="utf-8")]
    texts = [row["positive"] for row in (*rows, *query_rows)]
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(texts)])
    queries = [{"_id": f"q{i}", "text": row["anchor"]} for i, row in enumerate(query_rows)]
    write_rows(folder / "queries.jsonl", queries)
    lines = [f"q{i}\td{at}\t{grade}\n" for i in range(8) for at, grade in get_grades(i).items()]
    (folder / "qrels").mkdir()
    (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def reference_query_metrics(
    model: Path, beir_dir: Path, *, both_relevant: bool = True
) -> dict[str, np.ndarray]:
    """Return nDCG@10 and MRR@10 of each query, computed one query at a time.

    Without `both_relevant`, only the second document of a query is relevant.
    """
    texts = {
        name: [json.loads(line)["text"] for line in (beir_dir / f"{name}.jsonl").open()]
        for name in ("queries", "corpus")
    }
    scores = (
        reference_embeddings(model, texts["queries"], "")
        @ reference_embeddings(model, texts["corpus"], "").T
    )
    gains, reciprocals = [], []
    for i, line in enumerate(scores.tolist()):
        order = sorted(range(len(line)), key=lambda document: -line[document])
        grades = get_grades(i) if both_relevant else {32 + i: 1}
        ranks = [order.index(document) + 1 for document in grades]
        graded = zip(grades.values(), ranks, strict=True)
        gain = sum(grade / math.log2(rank + 1) for grade, rank in graded if rank <= 10)
        gains.append(gain / (3 + 1 / math.log2(3) if both_relevant else 1))
        reciprocals.append(1 / min(ranks) if min(ranks) <= 10 else 0)
    return {"ndcg@10": np.array(gains), "mrr@10": np.array(reciprocals)}


def reference_search_metrics(
    model: Path, beir_dir: Path, *, both_relevant: bool = True
) -> dict[str, float]:
    values = reference_query_metrics(model, beir_dir, both_relevant=both_relevant)
    return {name: float(metric_values.mean()) for name, metric_values in values.items()}


@pytest.mark.parametrize("rows", ["qrels", "dataset"])
def test_against_reports_paired_intervals_over_queries(
    rows: str,
    pairs: Path,
    beir_dir: Path,
    tiny_model_dir: ModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Expected intervals are those of scipy's paired bootstrap."""
    models = tiny_model_dir("bert", "mlm"), tiny_model_dir("roberta", "mlm")
    source = (
        ["--qrels", str(beir_dir / "qrels/dev.tsv")]
        if rows == "qrels"
        else [
            "--dataset",
            str(pairs / "validation.jsonl"),
            "--corpus",
            str(beir_dir / "corpus.jsonl"),
        ]
    )
    command = ["evaluate", str(models[0]), "--task", "embedding", "--against", str(models[1]),
               *source, "--resamples", "9999", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert run([*command, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)["against"]
    values = [reference_query_metrics(m, beir_dir, both_relevant=rows == "qrels") for m in models]
    for name, second_values in values[1].items():
        first_values = values[0][name]
        assert comparison["metrics"][name] == pytest.approx(second_values.mean(), abs=1e-6)
        assert (first_values - second_values).std() > 0.01
        expected = np.array(
            [
                bootstrap(
                    (first_values, second_values),
                    mean_difference,
                    paired=True,
                    method="percentile",
                    n_resamples=9_999,
                    rng=np.random.default_rng(seed),
                ).confidence_interval
                for seed in range(5)  # a percentile over few queries is not smooth
            ]
        )
        margin = 0.05 * (expected[:, 1] - expected[:, 0]).min()
        interval = np.array(comparison["difference_intervals"][name])
        assert (expected.min(0) - margin <= interval).all()
        assert (interval <= expected.max(0) + margin).all()
    assert run([*command, "--resamples", "100"]) == 0
    assert re.search(r"ndcg@10 .* of .*roberta.*difference [+-]0", capsys.readouterr().out)


def mean_difference(first: np.ndarray, second: np.ndarray, axis: int = 0) -> np.ndarray:
    return first.mean(axis) - second.mean(axis)


def test_retrieval_metrics_match_reference(
    pairs: Path, beir_dir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Applies to training, `evaluate RUN` and `evaluate --qrels`."""
    model, out = tiny_model_dir("bert", "mlm"), tmp_path / "run"
    data = {"dataset": str(pairs / "train.jsonl"), "qrels": str(beir_dir / "qrels/dev.tsv")}
    config = create_config(model, pairs, out).with_sections(data=data)
    summary = train(config).summary
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    expected = reference_search_metrics(merged, beir_dir)
    base_metrics = reference_search_metrics(model, beir_dir)
    assert summary["data"]["validation_rows"] == 8
    for settings in ({}, {"qrels": beir_dir / "qrels/dev.tsv"}):
        evaluation = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu", **settings))
        for name, value in expected.items():
            assert summary["metrics"][name] == pytest.approx(value, abs=1e-6)
            assert evaluation.metrics[name] == pytest.approx(value, abs=1e-6)
            assert evaluation.base[name] == pytest.approx(base_metrics[name], abs=1e-6)
    training = evaluate(EvaluateConfig(name=str(out), split="train", resamples=0, base=False))
    assert training.summary["data"]["examples"] == 32  # among the documents of the training rows


def test_validation_rows_are_searched_in_given_corpus(
    pairs: Path,
    beir_dir: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Metrics match the reference; a corpus without the relevant documents is rejected."""
    model = tiny_model_dir("bert", "mlm")
    config = create_config(
        model, pairs, tmp_path / "own", train={"max_steps": 1, "learning_rate": 1e-9}
    )
    corpus = {"corpus": str(beir_dir / "corpus.jsonl")}
    data = {**config.data.model_dump(exclude_defaults=True), **corpus}
    summary = train(config.with_sections(data=data)).summary
    for name, value in reference_search_metrics(model, beir_dir, both_relevant=False).items():
        assert summary["metrics"][name] == pytest.approx(value, abs=1e-6)
    checks = {check["name"]: check["count"] for check in summary["data"]["gate"]}
    assert checks["trained_documents"] == 32
    arguments = ["train", "--task", "embedding", "--model", str(model), "--dataset", str(pairs),
                 "--output-dir", str(tmp_path / "none"), "--device", "cpu"]  # fmt: skip
    small_corpus = write_rows(tmp_path / "other.jsonl", [{"text": "a cat that is old and more"}])
    assert run([*arguments, "--corpus", str(small_corpus)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "relevant documents that are not in the corpus: 8 of 8 validation rows" in message
    assert "validation.jsonl:1: 'a cat very that" in message or "'a very cat" in message
    qrels = ["--qrels", str(beir_dir / "qrels/dev.tsv")]
    assert run([*arguments, *qrels, "--corpus", str(beir_dir / "queries.jsonl")]) == 2
    assert "16 relevant judgments refer to a missing query or document" in capsys.readouterr().err
    assert run([*arguments, *qrels, "--validation-split", "0.1"]) == 2
    assert "both define the validation rows" in capsys.readouterr().err


def test_changed_corpus_is_reported_and_stops_resume(
    pairs: Path,
    beir_dir: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out, corpus = tiny_model_dir("bert", "mlm"), tmp_path / "run", tmp_path / "corpus.jsonl"
    shutil.copy(beir_dir / "corpus.jsonl", corpus)
    checkpointing = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    config = create_config(model, pairs, out, train=checkpointing)
    train(config.with_sections(data={"dataset": str(pairs), "corpus": str(corpus)}))

    def is_reported(*options: str) -> bool:
        assert run(["evaluate", str(out), "--resamples", "0", "--no-base", *options]) == 0
        return "corpus changed after training" in capsys.readouterr().err

    assert not is_reported()
    with corpus.open("a", encoding="utf-8") as file:
        file.write('{"_id": "new", "text": "another document"}\n')
    assert is_reported()
    assert not is_reported("--corpus", str(corpus))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    resume = ["train", str(out / "config.yaml"), "--output-dir", str(out), "--resume"]
    assert run(resume) == 2
    assert "data.validation_fingerprint (validation rows) was" in capsys.readouterr().err
    moved = corpus.with_name("moved.jsonl")
    shutil.copy(beir_dir / "corpus.jsonl", moved)
    assert run([*resume, "--corpus", str(moved)]) == 0


@pytest.mark.parametrize("loss", every(2, ["gist", "kl", "margin-mse", "triplet"]))
def test_validation_loss_needs_no_guide_teacher_or_negatives(
    loss: str, triplets: Path, pairs: Path, beir_dir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Rows without the inputs of the training loss are evaluated with mnrl."""
    model, auxiliary_model = tiny_model_dir("bert", "mlm"), tiny_model_dir("roberta", "mlm")
    overrides: dict[str, Any] = {"embedding": {"loss": loss}}
    if loss == "gist":
        overrides["embedding"]["guide"] = str(auxiliary_model)
    elif loss != "triplet":
        overrides["distillation"] = {"teacher": str(auxiliary_model)}
    out = tmp_path / "run"
    data = {"dataset": str(triplets), "qrels": str(beir_dir / "qrels/dev.tsv")}
    config = create_config(model, pairs, out, train={"max_steps": 1}, **overrides).with_sections(
        data=data
    )
    summary = train(config).summary
    evaluation = evaluate(EvaluateConfig(name=str(out), resamples=0, base=False, device="cpu"))
    assert evaluation.metrics["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert evaluation.metrics["ndcg@10"] == pytest.approx(summary["metrics"]["ndcg@10"], abs=1e-6)


def test_full_fine_tuning_is_evaluated_with_its_base(
    pairs: Path, beir_dir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model_dir("bert", "mlm"), model)
    summary = train(create_config(model, pairs, out, method={"kind": "full"})).summary
    evaluation = evaluate(EvaluateConfig(name=str(out), resamples=10, device="cpu"))
    for name, value in summary["metrics_before"].items():  # evaluated before step 1 in any case
        assert evaluation.base[name] == pytest.approx(value, abs=1e-6)
    assert evaluation.summary["difference_intervals"].keys() >= {"ndcg@10"}
    retrieval = {"qrels": beir_dir / "qrels/dev.tsv", "resamples": 0, "device": "cpu"}
    base_metrics = evaluate(EvaluateConfig(name=str(out), **retrieval)).base
    for name, value in reference_search_metrics(model, beir_dir).items():
        assert base_metrics[name] == pytest.approx(value, abs=1e-6)
    shutil.rmtree(model)
    assert evaluate(EvaluateConfig(name=str(out), **retrieval)).base == {}


@pytest.mark.parametrize(
    ("family", "head", "options", "factor"),
    [
        ("llama", "causal", [], "3.3 times the supervised rate"),
        ("llama", "causal", ["--method", "full"], "9 times the supervised rate"),
        ("llama", "causal", ["--max-steps", "3000"], "1.8 times the supervised rate"),
        ("llama", "causal", ["--method", "prefix"], ""),
        ("bert", "mlm", [], ""),
    ],
)
def test_decoders_have_a_higher_default_rate_in_short_runs(
    family: str,
    head: str,
    options: list[str],
    factor: str,
    pairs: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model_dir(family, head)
    command = ["train", "--task", "embedding", "--model", str(model), "--dataset", str(pairs),
               "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]  # fmt: skip
    assert run([*command, *options]) == 0
    output = " ".join("".join(capsys.readouterr()).split())
    assert ("times the supervised rate, measured" in output) == bool(factor), output
    assert factor in output
