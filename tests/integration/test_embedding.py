"""Embedding models: training, saving, evaluation, merging, and any micro-batch split."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import bootstrap
from transformers import AutoModel, AutoTokenizer

import ranks
from ftlevel.artifacts.sentence_transformers import EmbeddingFormat, save_embedding_format
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.commands.preview import preview
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, MergeConfig, ModelConfig, PredictConfig, TrainConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.objectives import StepTexts
from ftlevel.tasks.embedding.losses import STEP_LOSSES, LossConfig
from sampling import every

ModelDir = Callable[..., Path]
_NAMES = ("cat", "dog", "house", "tree", "river", "stone", "bird", "fish")
_WORDS = ("old", "new", "red", "big")


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
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
    _write(folder / "train.jsonl", rows)
    other = [{name: text.replace(" ", " very ", 1) for name, text in row.items()} for row in rows]
    _write(folder / "validation.jsonl", other[::4])
    return folder


def _config(model: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    sections: dict[str, Any] = {
        "task": "embedding",
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(data)},
        "train": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        "output": {"dir": out},
    }
    for name, own in more.items():
        given = sections.get(name)
        both = isinstance(given, dict) and isinstance(own, dict)
        sections[name] = {**given, **own} if both else own  # type: ignore[dict-item]
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
]


@pytest.mark.parametrize(("family", "head", "method"), CELLS)
def test_models_of_every_kind_train_and_evaluate_alike(
    family: str,
    head: str | None,
    method: str,
    pairs: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    config = _config(tiny_model_dir(family, head), pairs, out, method={"kind": method})
    summary = train(config).summary
    assert set(summary["metrics"]) >= {"loss", "ndcg@10", "mrr@10", "recall@10", "map@100"}
    found = evaluate(EvaluateConfig(name=str(out), resamples=0, base=False, device="cpu"))
    assert found.metrics["ndcg@10"] == pytest.approx(summary["metrics"]["ndcg@10"], abs=1e-6)
    assert found.metrics["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert (out / "adapter" / "modules.json").is_file()


def _adapter(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def _difference(one: Path, other: Path) -> float:
    first, second = _adapter(one), _adapter(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CUTS: dict[str, dict[str, Any]] = {
    "accumulated": {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}},
    "cached": {"speed": {"tokens_per_micro_batch": 32}, "embedding": {"grad_cache": "always"}},
    "kept": {"speed": {"tokens_per_micro_batch": 32}, "embedding": {"grad_cache": "never"}},
    "plain": {"speed": {"fast": False}},
}


@pytest.mark.parametrize(
    ("loss", "cuts"),
    [
        ("mnrl", tuple(CUTS)),
        ("cosent", ("cached",)),
        pytest.param("cosent", tuple(CUTS), marks=pytest.mark.sweep),
    ],
)
def test_a_step_may_be_cut_in_any_way(
    loss: str, cuts: tuple[str, ...], pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model, data = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), pairs
    if loss == "cosent":
        rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
        scored = [
            {"sentence1": row["anchor"], "sentence2": row["positive"], "score": i % 5 / 4}
            for i, row in enumerate(rows)
        ]
        data = _write(tmp_path / "scored.jsonl", scored)
    # AdamW would turn the rounding of a gradient near zero into a whole step.
    plain = {"optim": "sgd", "learning_rate": 0.5}
    train(_config(model, data, tmp_path / "whole", train=plain))
    start = _adapter(tmp_path / "whole")
    assert max(float(start[name].abs().max()) for name in start if "lora_B" in name) > 1e-3
    for name in cuts:
        cut = CUTS[name]
        more = {**cut, "train": {**plain, **cut.get("train", {})}}
        train(_config(model, data, tmp_path / name, **more))
        assert _difference(tmp_path / "whole", tmp_path / name) < 1e-6, name


def _train_rank(model: Path, data: Path, out: Path) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 4}
    more = {"tokens_per_micro_batch": 48}
    train(_config(model, data, out, train=settings, speed=more))


def test_two_processes_see_one_step(pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """Two processes of 4 rows each take the steps of one process with 8."""
    model = tiny_model_dir("bert", "mlm", **_NO_DROPOUT)
    train(_config(model, pairs, tmp_path / "one", train={"optim": "sgd", "learning_rate": 0.5}))
    both = ranks.start(_train_rank, [(model, pairs, tmp_path / "two")] * 2)
    assert ranks.end(both) == [0, 0]
    assert _difference(tmp_path / "one", tmp_path / "two") < 1e-6


@pytest.fixture(scope="module")
def two_sets(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of 13 and 6 rows; the label of a positive is 1 in one and 2 in the other."""
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    folder, files = tmp_path_factory.mktemp("sets"), []
    for label, own in ((1, rows[:13]), (2, rows[13:19])):
        listed = [
            {"query": row["anchor"], "documents": [row["positive"]], "labels": [label]}
            for row in own
        ]
        files.append(str(_write(folder / f"set{label}.jsonl", listed)))
    return files


def _train_sets(model: Path, files: list[str], out: Path, batch: int, accumulated: int) -> None:
    """Train two epochs, and write the labels of each step's positives to OUT.RANK.json."""
    seen: list[list[float]] = []
    mnrl = STEP_LOSSES["mnrl"]

    def record(vectors: torch.Tensor, step: StepTexts, options: LossConfig) -> torch.Tensor:
        seen.append([label for labels in step.labels for label in labels])
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
        more = {"train": train_settings, "speed": {"verify": False}}
        config = _config(model, Path(files[0]), out, **more)
        also = config.data.model_copy(update={"also": tuple(files[1:])})
        train(config.with_sections(data=also))
    out.with_suffix(f".{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))


def test_a_step_has_rows_of_one_dataset(
    two_sets: list[str], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """In steps of 4, 13 and 6 rows are 4 and 2 steps, also accumulated and in two processes."""
    model = tiny_model_dir("bert", "mlm", **_NO_DROPOUT)
    _train_sets(model, two_sets, tmp_path / "one", 4, 1)
    _train_sets(model, two_sets, tmp_path / "accumulated", 1, 4)
    both = ranks.start(_train_sets, [(model, two_sets, tmp_path / "two", 2, 1)] * 2)
    assert ranks.end(both) == [0, 0]
    steps = json.loads((tmp_path / "one.0.json").read_text())
    assert len(steps) == 2 * (4 + 2)
    assert all(len(set(labels)) == 1 for labels in steps)
    for epoch in (steps[:6], steps[6:]):
        assert sorted(map(len, epoch)) == [1, 2, 4, 4, 4, 4]
    assert steps[:6] != steps[6:]
    for name in ("accumulated.0", "two.0", "two.1"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == steps, name
    for name in ("accumulated", "two"):
        assert _difference(tmp_path / "one", tmp_path / name) < 1e-6, name


def test_dropout_is_replayed(pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """Both ways to compute a step draw the same dropout, BERT's and LoRA's: the bits are equal."""
    model = tiny_model_dir("bert", "mlm")
    small, method = {"tokens_per_micro_batch": 48}, {"kind": "lora", "lora_dropout": 0.2}
    for way in ("always", "never"):
        train(_config(model, pairs, tmp_path / way, speed=small, method=method,
                      embedding={"grad_cache": way}))  # fmt: skip
    assert _difference(tmp_path / "always", tmp_path / "never") == 0


def test_an_interrupted_run_resumes(pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    model = tiny_model_dir("bert", "mlm")
    train(_config(model, pairs, tmp_path / "whole", train={"max_steps": 6}))
    half = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}

    class Stop(Exception):
        """Ends the run."""

    from transformers import TrainerCallback

    class StopAt4(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise Stop

    with pytest.raises(Stop):
        train(_config(model, pairs, tmp_path / "half", train=half), callbacks=[StopAt4()])
    again = {"dir": tmp_path / "half", "resume": True}
    train(_config(model, pairs, tmp_path / "half", train=half, output=again))
    assert _difference(tmp_path / "whole", tmp_path / "half") == 0


def test_a_merged_model_has_the_vectors_of_its_adapter(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The checkpoint has no pooler, which no vector depends on."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    train(_config(tiny_model_dir("bert", "mlm"), pairs, out))
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    assert (merged / "modules.json").is_file()
    found = [
        evaluate(
            EvaluateConfig(
                name=str(name), dataset=str(pairs), resamples=0, base=False, device="cpu"
            )
        )
        for name in (out, merged)
    ]
    assert found[0].metrics == pytest.approx(found[1].metrics, abs=1e-5)


BAD: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "one column": ([{"anchor": "a cat"}] * 4, [], "the columns do not say what to learn"),
    "labels alike": (
        [{"sentence1": f"a cat {i}", "sentence2": "a dog", "score": 1} for i in range(4)],
        [],
        "the label of all 4 rows is 1",
    ),
    "positive is query": (
        [{"anchor": f"a cat {i}", "positive": f"a cat {i}"} for i in range(4)],
        [],
        "the positive of every row equals its query",
    ),
    "no relevant document": (
        [{"query": f"a cat {i}", "documents": ["a dog"], "labels": [i % 2]} for i in range(4)],
        [],
        "rows.jsonl:1: no document has a label above 0, as in 2 of 4 rows",
    ),
    "unknown pooling": ([], ["--pooling", "median"], "median"),
    "too many dimensions": ([], ["--matryoshka-dims", "128,64"], "128: embeddings of"),
    "a batch of one": (
        [],
        ["--per-device-train-batch-size", "1"],
        "--per-device-train-batch-size 1: --loss mnrl",
    ),
    "another loss": ([], ["--loss", "cosent"], "--loss cosent needs scores"),
    "no negatives": ([], ["--loss", "triplet"], "needs a negative in every row"),
    "no guide": ([], ["--loss", "gist"], "Add --guide MODEL"),
    "another task's loss": ([], ["--loss", "dpo"], "dpo"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_weights_load(
    case: str,
    pairs: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, flags, expected = BAD[case]
    data = _write(tmp_path / "rows.jsonl", rows) if rows else pairs
    monkeypatch.setattr(
        "ftlevel.training.model.load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    arguments = ["train", "--task", "embedding", "--model", str(tiny_model_dir("bert", "mlm")),
                 "--dataset", str(data), "--output-dir", str(tmp_path / "run"),
                 "--device", "cpu"]  # fmt: skip
    assert run([*arguments, *flags]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ftlevel:")]
    assert len(said) == 1
    assert expected in said[0]


def test_a_decoder_without_eos_cannot_pool_its_last_token(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama", None, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    with pytest.raises(ConfigError, match="has no EOS token"):
        train(_config(model, pairs, tmp_path / "run"))


@pytest.fixture(scope="module")
def triplets(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 16 rows with a negative."""
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    found = [
        {**row, "negative": rows[(i + 5) % len(rows)]["positive"]}
        for i, row in enumerate(rows[:16])
    ]
    return _write(tmp_path_factory.mktemp("triplets") / "rows.jsonl", found)


def test_a_guide_and_a_teacher_may_have_another_tokenizer(
    triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """GIST asks the guide about every text; kl learns the teacher's distribution."""
    model, other = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), tiny_model_dir("roberta", "mlm")
    guided = {"loss": "gist", "guide": str(other)}
    first = train(_config(model, triplets, tmp_path / "gist", embedding=guided)).summary
    assert first["loss_first"] > 0
    taught = {"distillation": {"teacher": str(other)}, "embedding": {"loss": "kl"}}
    apart = train(_config(model, triplets, tmp_path / "other", **taught)).summary
    own = {"distillation": {"teacher": str(model)}, "embedding": {"loss": "kl"}}
    same = train(_config(model, triplets, tmp_path / "same", **own)).summary
    assert same["loss_first"] == pytest.approx(0, abs=1e-6)  # the model is its own teacher
    assert apart["loss_first"] > 1e-6


def test_a_teacher_may_be_a_reranker(
    triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """margin-mse learns the margins of the scores that `predict` returns."""
    rows = [json.loads(line) for line in triplets.open(encoding="utf-8")][:8]
    listed = [
        {"query": r["anchor"], "documents": [r["positive"], r["negative"]], "labels": [1, 0]}
        for r in rows
    ]
    reranker = tmp_path / "reranker"
    teacher = _config(tiny_model_dir("bert", "mlm"), _write(tmp_path / "listed.jsonl", listed),
                      reranker)  # fmt: skip
    train(teacher.with_sections(task="reranking"))
    candidates = [{name: row[name] for name in ("query", "documents")} for row in listed]
    scored = predict(PredictConfig(name=str(reranker), device="cpu"), candidates).rows or []
    model, data = tiny_model_dir("bert", "mlm", **_NO_DROPOUT), _write(tmp_path / "r.jsonl", rows)
    more = {"distillation": {"teacher": str(reranker)}, "embedding": {"loss": "margin-mse"}}
    found = train(_config(model, data, tmp_path / "run", train={"max_steps": 1}, **more)).summary
    texts = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    query, good, bad = (_by_hand(model, own, "") for own in texts)
    margins = (query * good).sum(1) - (query * bad).sum(1)
    wanted = torch.tensor([row["prediction"][0] - row["prediction"][1] for row in scored])
    assert found["loss_first"] == pytest.approx(float((margins - wanted).square().mean()), rel=1e-4)


def test_matryoshka_reports_every_dimension(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"matryoshka_dims": [64, 16]}
    config = _config(tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run", embedding=settings)
    metrics = train(config).summary["metrics"]
    assert metrics["ndcg@10_dim_64"] == metrics["ndcg@10"]
    assert "ndcg@10_dim_16" in metrics


def test_long_texts_are_refused_or_cut(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    config = _config(tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run")
    short = config.data.model_copy(update={"max_length": 12})
    with pytest.raises(FtlevelError, match="longer than 12 tokens"):
        train(config.with_sections(data=short))
    cut = short.model_copy(update={"overlong": "truncate"})
    summary = train(config.with_sections(data=cut)).summary
    assert summary["data"]["shortened"] > 0


def test_preview_shows_texts_side_by_side(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"query_prompt": "query: "}
    config = _config(tiny_model_dir("bert", "mlm"), pairs, tmp_path / "run", embedding=settings)
    (row,) = preview(config, [1]).rows
    assert "query: tokens 1-" in row.label
    assert "document, label 1: tokens" in row.label
    assert [token.label for token in row.tokens if token.label] == ["query, prompt", "document 1"]


def test_training_continues_an_adapter_with_its_pooling_and_prompts(
    pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    settings = {"pooling": "cls", "normalize": False, "query_prompt": "find: "}
    model = tiny_model_dir("bert", "mlm")
    train(_config(model, pairs, tmp_path / "first", embedding=settings))
    adapter = {"adapter": str(tmp_path / "first"), "device": "cpu"}
    config = _config(model, pairs, tmp_path / "second").with_sections(model=ModelConfig(**adapter))
    train(config)
    forms = [
        json.loads((tmp_path / name / "adapter" / "ftlevel.json").read_text())["options"]
        for name in ("first", "second")
    ]
    assert forms[0]["embedding"]["form"] == forms[1]["embedding"]["form"]
    assert forms[1]["embedding"]["form"]["query_prompt"] == "find: "


def _by_hand(model: Path, texts: list[str], prompt: str) -> torch.Tensor:
    """Return the normalized means of the states after the prompt, one text at a time."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    skipped = len(tokenizer(prompt)["input_ids"]) - 1 if prompt else 0
    found = []
    with torch.no_grad():
        for text in texts:
            states = network(**tokenizer(prompt + text, return_tensors="pt")).last_hidden_state[0]
            found.append(torch.nn.functional.normalize(states[skipped:].mean(0), dim=0))
    return torch.stack(found)


def test_prompts_that_are_not_pooled(pairs: Path, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    """`include_prompt: false` counts in training, evaluation, prediction and saved files alike."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("bert", "mlm", **_NO_DROPOUT), model)
    form = EmbeddingFormat("mean", True, query_prompt="the old house: ", include_prompt=False)
    save_embedding_format(model, form, 64)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")][:8]
    data = _write(tmp_path / "rows.jsonl", rows)
    first = train(_config(model, data, tmp_path / "run", train={"max_steps": 1})).summary
    queries, documents = [r["anchor"] for r in rows], [r["positive"] for r in rows]
    scores = 20 * _by_hand(model, queries, form.query_prompt) @ _by_hand(model, documents, "").T
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(8))
    assert first["loss_first"] == pytest.approx(float(expected), abs=1e-5)
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=merged, device="cpu"))
    for name in (tmp_path / "run/adapter", merged):
        assert json.loads((name / "1_Pooling/config.json").read_text())["include_prompt"] is False
    settings = {"device": "cpu", "columns": {"query": "anchor"}, "ignore_columns": ("positive",)}
    found = predict(PredictConfig(name=str(merged), **settings), rows).rows or []
    vectors = torch.stack([torch.as_tensor(row["prediction"]) for row in found])
    assert torch.allclose(vectors, _by_hand(merged, queries, form.query_prompt), atol=1e-6)
    adapter = _config(model, data, tmp_path / "more", train={"max_steps": 1}).with_sections(
        model=ModelConfig(adapter=str(tmp_path / "run"), device="cpu")
    )
    train(adapter)
    card = json.loads((tmp_path / "more/adapter/ftlevel.json").read_text())
    assert card["options"]["embedding"]["form"]["include_prompt"] is False


@pytest.mark.parametrize("flag", ["guide", "teacher"])
def test_a_run_does_not_resume_with_another_guide_or_teacher(
    flag: str, triplets: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The model may move, but its weights and its pooling may not change."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir("roberta", "mlm"), other)
    more: dict[str, Any] = {"embedding": {"loss": "gist", "guide": str(other)}}
    if flag == "teacher":
        more = {"embedding": {"loss": "kl"}, "distillation": {"teacher": str(other)}}
    saving = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    model, out = tiny_model_dir("bert", "mlm"), tmp_path / "run"
    train(_config(model, triplets, out, train=saving, **more))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    again = {"dir": out, "resume": True}
    save_embedding_format(other, EmbeddingFormat("cls", normalize=True), 64)
    with pytest.raises(ConfigError, match=f"{flag} was"):
        train(_config(model, triplets, out, train=saving, output=again, **more))
    for path in (other / "modules.json", other / "config_sentence_transformers.json"):
        path.unlink()
    moved = other.rename(tmp_path / "moved")
    section = "distillation" if flag == "teacher" else "embedding"
    more = {**more, section: {**more[section], flag: str(moved)}}
    train(_config(model, triplets, out, train=saving, output=again, **more))


@pytest.fixture(scope="module")
def beir(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judgments of 8 queries, each with two relevant documents, among 32 + 8 documents."""
    folder = tmp_path_factory.mktemp("beir")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").open(encoding="utf-8")]
    asked = [json.loads(line) for line in (pairs / "validation.jsonl").open(encoding="utf-8")]
    texts = [row["positive"] for row in (*rows, *asked)]
    _write(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(texts)])
    queries = [{"_id": f"q{i}", "text": row["anchor"]} for i, row in enumerate(asked)]
    _write(folder / "queries.jsonl", queries)
    lines = [f"q{i}\td{at}\t1\n" for i in range(8) for at in (4 * i, 32 + i)]
    (folder / "qrels").mkdir()
    (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def _queries_by_hand(model: Path, beir: Path, *, both: bool = True) -> dict[str, np.ndarray]:
    """Return nDCG@10 and MRR@10 of each query of a search one query at a time.

    Without `both`, only the second of its documents is relevant to a query.
    """
    texts = {
        name: [json.loads(line)["text"] for line in (beir / f"{name}.jsonl").open()]
        for name in ("queries", "corpus")
    }
    scores = _by_hand(model, texts["queries"], "") @ _by_hand(model, texts["corpus"], "").T
    gains, reciprocals = [], []
    for i, line in enumerate(scores.tolist()):
        order = sorted(range(len(line)), key=lambda at: -line[at])
        ranks = [order.index(at) + 1 for at in ((4 * i, 32 + i) if both else (32 + i,))]
        found = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
        gains.append(found / (1 + 1 / math.log2(3) if both else 1))
        reciprocals.append(1 / min(ranks) if min(ranks) <= 10 else 0)
    return {"ndcg@10": np.array(gains), "mrr@10": np.array(reciprocals)}


def _search_by_hand(model: Path, beir: Path, *, both: bool = True) -> dict[str, float]:
    values = _queries_by_hand(model, beir, both=both)
    return {name: float(each.mean()) for name, each in values.items()}


@pytest.mark.parametrize("rows", ["qrels", "dataset"])
def test_two_models_are_compared_query_by_query(
    rows: str,
    pairs: Path,
    beir: Path,
    tiny_model_dir: ModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is searched with its own tokens and pooling; intervals are scipy's, of paired draws."""
    models = tiny_model_dir("bert", "mlm"), tiny_model_dir("roberta", "mlm")
    source = (
        ["--qrels", str(beir / "qrels/dev.tsv")]
        if rows == "qrels"
        else ["--dataset", str(pairs / "validation.jsonl"), "--corpus", str(beir / "corpus.jsonl")]
    )
    command = ["evaluate", str(models[0]), "--task", "embedding", "--against", str(models[1]),
               *source, "--resamples", "9999", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against"]
    values = [_queries_by_hand(m, beir, both=rows == "qrels") for m in models]
    for name, other in values[1].items():
        own = values[0][name]
        assert found["metrics"][name] == pytest.approx(other.mean(), abs=1e-6)
        assert (own - other).std() > 0.01
        expected = np.array(
            [
                bootstrap(
                    (own, other),
                    _mean_difference,
                    paired=True,
                    method="percentile",
                    n_resamples=9_999,
                    rng=np.random.default_rng(seed),
                ).confidence_interval
                for seed in range(5)  # a percentile of few queries jumps from one mean to the next
            ]
        )
        margin = 0.05 * (expected[:, 1] - expected[:, 0]).min()
        interval = np.array(found["difference_intervals"][name])
        assert (expected.min(0) - margin <= interval).all()
        assert (interval <= expected.max(0) + margin).all()
    assert run([*command, "--resamples", "100"]) == 0
    assert re.search(r"ndcg@10 .* of .*roberta.*difference [+-]0", capsys.readouterr().out)


def _mean_difference(own: np.ndarray, other: np.ndarray, axis: int = 0) -> np.ndarray:
    return own.mean(axis) - other.mean(axis)


def test_training_searches_the_corpus_of_a_retrieval_set(
    pairs: Path, beir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Metrics in training, of `evaluate RUN` and of `evaluate --qrels` are those of plain loops."""
    model, out = tiny_model_dir("bert", "mlm"), tmp_path / "run"
    data = {"dataset": str(pairs / "train.jsonl"), "qrels": str(beir / "qrels/dev.tsv")}
    sections = _config(model, pairs, out).with_sections(data=data)
    summary = train(sections).summary
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    expected = _search_by_hand(merged, beir)
    before = _search_by_hand(model, beir)
    assert summary["data"]["validation_rows"] == 8
    for settings in ({}, {"qrels": beir / "qrels/dev.tsv"}):
        found = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu", **settings))
        for name, value in expected.items():
            assert summary["metrics"][name] == pytest.approx(value, abs=1e-6)
            assert found.metrics[name] == pytest.approx(value, abs=1e-6)
            assert found.base[name] == pytest.approx(before[name], abs=1e-6)
    training = evaluate(EvaluateConfig(name=str(out), split="train", resamples=0, base=False))
    assert training.summary["data"]["examples"] == 32  # among their own documents


def test_validation_rows_are_looked_up_in_another_corpus(
    pairs: Path,
    beir: Path,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The search is that of plain loops; a corpus has to hold the relevant documents."""
    model = tiny_model_dir("bert", "mlm")
    config = _config(model, pairs, tmp_path / "own", train={"max_steps": 1, "learning_rate": 1e-9})
    corpus = {"corpus": str(beir / "corpus.jsonl")}
    wide = {**config.data.model_dump(exclude_defaults=True), **corpus}
    found = train(config.with_sections(data=wide)).summary
    for name, value in _search_by_hand(model, beir, both=False).items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6)
    checks = {each["name"]: each["count"] for each in found["data"]["gate"]}
    assert checks["trained_documents"] == 32
    arguments = ["train", "--task", "embedding", "--model", str(model), "--dataset", str(pairs),
                 "--output-dir", str(tmp_path / "none"), "--device", "cpu"]  # fmt: skip
    other = _write(tmp_path / "other.jsonl", [{"text": "a cat that is old and more"}])
    assert run([*arguments, "--corpus", str(other)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "relevant documents that are not in the corpus: 8 of 8 validation rows" in said
    assert "validation.jsonl:1: 'a cat very that" in said or "'a very cat" in said
    qrels = ["--qrels", str(beir / "qrels/dev.tsv")]
    assert run([*arguments, *qrels, "--corpus", str(beir / "queries.jsonl")]) == 2
    assert "16 relevant judgments refer to a missing query or document" in capsys.readouterr().err
    assert run([*arguments, *qrels, "--validation-split", "0.1"]) == 2
    assert "both define the validation rows" in capsys.readouterr().err


@pytest.mark.parametrize("loss", every(2, ["gist", "kl", "margin-mse", "triplet"]))
def test_validation_rows_need_no_guide_teacher_or_negatives(
    loss: str, triplets: Path, pairs: Path, beir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """Rows of which the training loss is unknown are scored by mnrl, in `evaluate` too."""
    model, other = tiny_model_dir("bert", "mlm"), tiny_model_dir("roberta", "mlm")
    more: dict[str, Any] = {"embedding": {"loss": loss}}
    if loss == "gist":
        more["embedding"]["guide"] = str(other)
    elif loss != "triplet":
        more["distillation"] = {"teacher": str(other)}
    out = tmp_path / "run"
    data = {"dataset": str(triplets), "qrels": str(beir / "qrels/dev.tsv")}
    config = _config(model, pairs, out, train={"max_steps": 1}, **more).with_sections(data=data)
    summary = train(config).summary
    found = evaluate(EvaluateConfig(name=str(out), resamples=0, base=False, device="cpu"))
    assert found.metrics["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert found.metrics["ndcg@10"] == pytest.approx(summary["metrics"]["ndcg@10"], abs=1e-6)


def test_a_model_trained_in_full_is_evaluated_beside_its_base(
    pairs: Path, beir: Path, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model_dir("bert", "mlm"), model)
    summary = train(_config(model, pairs, out, method={"kind": "full"})).summary
    found = evaluate(EvaluateConfig(name=str(out), resamples=10, device="cpu"))
    for name, value in summary["metrics_before"].items():  # evaluated before step 1 in any case
        assert found.base[name] == pytest.approx(value, abs=1e-6)
    assert found.summary["difference_intervals"].keys() >= {"ndcg@10"}
    judged = {"qrels": beir / "qrels/dev.tsv", "resamples": 0, "device": "cpu"}
    before = evaluate(EvaluateConfig(name=str(out), **judged)).base
    for name, value in _search_by_hand(model, beir).items():
        assert before[name] == pytest.approx(value, abs=1e-6)
    shutil.rmtree(model)
    assert evaluate(EvaluateConfig(name=str(out), **judged)).base == {}
