"""--task reranking: encoders and decoders train, and the files give equal scores elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.export import export
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, ExportConfig, MergeConfig, PredictConfig, TrainConfig
from ftlevel.errors import ConfigError, FtlevelError, InputError, RunError
from ftlevel.extras.serving.check import check_served
from ftlevel.extras.serving.config import CheckServedConfig
from sampling import sample

ModelDir = Callable[..., Path]
WORDS = "cat dog sun moon river stone bread wine horse bird tree leaf cloud rain snow fire".split()


def _rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return queries, each with a document that repeats it and two others."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        query, *others = (" ".join(draw.sample(WORDS, 3)) for _ in range(3))
        documents = [f"{query} {draw.choice(WORDS)}", *others]
        labels = [1, 0, 0]
        order = draw.sample(range(3), 3)
        found.append(
            {
                "query": query,
                "documents": [documents[i] for i in order],
                "labels": [labels[i] for i in order],
            }
        )
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"query": row["query"], "document": document, "label": label}
        for row in rows
        for document, label in zip(row["documents"], row["labels"], strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reranking")
    _write(place / "lists.jsonl", _rows(24))
    _write(place / "held_out.jsonl", _rows(8, 1))
    _write(place / "pairs.jsonl", _pairs(_rows(24)))
    _write(place / "held_out_pairs.jsonl", _pairs(_rows(8, 1)))
    return place


Trained = tuple[Path, Any]


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_model_dir: ModelDir) -> Callable[[str, str], Trained]:
    """Train once for each family and loss."""
    known: dict[tuple[str, str], Trained] = {}

    def get(family: str, loss: str) -> Trained:
        if (family, loss) not in known:
            kind = "" if loss == "lce" else "_pairs"
            data = "lists" if loss == "lce" else "pairs"
            out = folder / f"{family}-{loss}"
            model = tiny_model_dir(family, "mlm" if family == "bert" else None)
            config = TrainConfig.model_validate(
                {
                    "task": "reranking",
                    "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
                    "data": {
                        "dataset": str(folder / f"{data}.jsonl"),
                        "validation_file": str(folder / f"held_out{kind}.jsonl"),
                    },
                    "reranking": {"loss": None if loss == "lce" else loss},
                    "train": {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 1},
                    "output": {"dir": str(out)},
                }
            )
            known[family, loss] = out, train(config).summary
        return known[family, loss]

    return get


CELLS = [("bert", "lce"), ("llama", "lce"), ("bert", "bce"), ("llama", "bce")]


def _scores(model: Any, directory: Path, *, bce: bool) -> list[float]:
    """Score the held-out pairs as transformers does: two texts, the logit of one label."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for row in _rows(8, 1):
        for document in row["documents"]:
            inputs = tokenizer(row["query"], document, return_tensors="pt")
            with torch.no_grad():
                logit = model.eval()(**inputs).logits[0, 0]
            found.append(float(logit.sigmoid() if bce else logit))
    return found


def _predicted(name: Path, folder: Path, file: str) -> list[float]:
    config = PredictConfig(
        name=str(name), dataset=str(folder / f"{file}.jsonl"), dtype="float32", device="cpu"
    )
    rows = predict(config).rows or []
    return [score for row in rows for score in np.atleast_1d(row["prediction"]).tolist()]


@pytest.mark.parametrize(("family", "loss"), sample(CELLS))
def test_scores_are_those_of_transformers_and_of_the_merged_model(
    family: str, loss: str, trained: Callable[[str, str], Trained], folder: Path, tmp_path: Path
) -> None:
    out, summary = trained(family, loss)
    assert summary["data"]["reranking"]["loss"] == loss
    assert {"loss", "ndcg@10", "mrr@10", "map"} <= set(summary["metrics"])
    assert 0 < summary["metrics"]["ndcg@10"] <= 1
    assert summary["proof"]["adapter_effect"] > 1e-3
    adapter, bce = out / "adapter", loss == "bce"
    ours = _predicted(out, folder, "held_out" if loss == "lce" else "held_out_pairs")
    card = json.loads((adapter / "ftlevel.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(card["base"]["name"], num_labels=1)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(adapter).pad_token_id
    assert ours == pytest.approx(
        _scores(PeftModel.from_pretrained(base, adapter), adapter, bce=bce), abs=1e-5
    )
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    assert ours == pytest.approx(_scores(plain, merged, bce=bce), abs=1e-5)
    for place in (adapter, merged):
        settings = json.loads((place / "config_sentence_transformers.json").read_text())
        assert settings["model_type"] == "CrossEncoder"
        assert settings["activation_fn"].endswith("Sigmoid" if bce else "Identity")


@pytest.mark.parametrize(("family", "loss"), [("bert", "lce"), ("llama", "bce")])
def test_evaluate_repeats_the_metrics_of_training(
    family: str, loss: str, trained: Callable[[str, str], Trained]
) -> None:
    out, summary = trained(family, loss)
    found = evaluate(EvaluateConfig(name=str(out), device="cpu", resamples=50))
    for name in ("loss", "ndcg@10", "mrr@10", "map"):
        assert found.metrics[name] == pytest.approx(summary["metrics"][name], abs=1e-5)
    low, high = found.summary["intervals"]["ndcg@10"]
    assert low <= found.metrics["ndcg@10"] <= high


def test_a_decoders_tokenizer_marks_query_and_document(
    trained: Callable[[str, str], Trained],
) -> None:
    adapter = trained("llama", "lce")[0] / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("cat", "dog")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert "\n" in tokenizer.decode(ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_lists_and_pairs_give_the_same_metrics(
    trained: Callable[[str, str], Trained], folder: Path
) -> None:
    """The documents of a query are ranked together, in however many rows they are."""
    out, _ = trained("bert", "lce")
    found = [
        evaluate(
            EvaluateConfig(
                name=str(out), dataset=str(folder / f"{name}.jsonl"), device="cpu", resamples=0
            )
        ).metrics
        for name in ("held_out", "held_out_pairs")
    ]
    for name in ("ndcg@10", "mrr@10", "map", "average_precision"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)


def _serve(model: Any, tokenizer: Any, form: str) -> Iterator[str]:
    """Answer /rerank as vLLM ("results") or text-embeddings-inference ("texts") does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = []
            for at, text in enumerate(asked["documents" if form == "results" else "texts"]):
                inputs = tokenizer(asked["query"], text, return_tensors="pt")
                with torch.no_grad():
                    logit = model(**inputs).logits[0, 0]
                raw = form == "texts" and asked["raw_scores"]
                name = "relevance_score" if form == "results" else "score"
                rows.append({"index": at, name: float(logit if raw else logit.sigmoid())})
            rows = sorted(rows, key=lambda row: -list(row.values())[1])
            body = json.dumps({"results": rows} if form == "results" else rows).encode()
            self.send_response(200 if self.path == "/rerank" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("server", "form"), [("vllm", "results"), ("tei", "texts")])
def test_an_export_is_checked_on_a_server_of_scores(
    server: str, form: str, trained: Callable[[str, str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "served"
    export(ExportConfig(model=str(trained("bert", "bce")[0]), out=out, server=server))
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    for url in _serve(model, AutoTokenizer.from_pretrained(out), form):
        found = check_served(CheckServedConfig(out=out, url=url)).summary
        assert found["max_difference"] < 1e-5
        with torch.no_grad():
            model.classifier.bias += 1
        with pytest.raises(RunError, match="not those of training"):
            check_served(CheckServedConfig(out=out, url=url))


@pytest.mark.parametrize(
    ("family", "reason"), [("bert", "the segment of the query"), ("llama", "has no tensor for")]
)
def test_a_reranker_is_no_gguf_file(
    family: str, reason: str, trained: Callable[[str, str], Trained], tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    with pytest.raises(InputError, match=reason):
        export(ExportConfig(model=str(trained(family, "bce")[0]), out=out, format="gguf"))
    with pytest.raises(FtlevelError, match=r"llama\.cpp"):
        export(ExportConfig(model=str(trained(family, "bce")[0]), out=out, server="llama.cpp"))


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: ModelDir) -> Path:
    """A cross-encoder with another tokenizer than the student's."""
    return tiny_model_dir("roberta", "seqcls", num_labels=1)


def _distill(model: Path, teacher: Path, folder: Path, out: Path, **sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "task": "reranking",
            "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
            "data": {
                "dataset": str(folder / "lists.jsonl"),
                "validation_file": str(folder / "held_out.jsonl"),
            },
            "distillation": {"teacher": str(teacher)},
            "train": {"max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 1},
            "output": {"dir": str(out)},
            **sections,
        }
    )


@pytest.mark.parametrize("loss", [None, "mse"])
def test_a_teachers_logits_are_learned(
    loss: str | None, tiny_model_dir: ModelDir, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    """The validation loss is that of the two models' logits, by transformers and the formula."""
    model = tiny_model_dir("bert", "mlm")
    config = _distill(model, teacher, folder, tmp_path / "run", reranking={"loss": loss})
    found = train(config).summary
    assert found["data"]["reranking"]["loss"] == (loss or "margin-mse")
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=merged, device="cpu"))
    student, taught = (
        np.array(
            _scores(AutoModelForSequenceClassification.from_pretrained(place), place, bce=False)
        ).reshape(8, 3)
        for place in (merged, teacher)
    )
    if loss == "mse":
        expected = np.mean((student - taught) ** 2)
    else:
        margins = [
            (own[good] - own[bad]) - (wanted[good] - wanted[bad])
            for row, own, wanted in zip(_rows(8, 1), student, taught, strict=True)
            for good in range(3)
            for bad in range(3)
            if row["labels"][good] > row["labels"][bad]
        ]
        expected = np.mean(np.square(margins))
    assert found["metrics"]["loss"] == pytest.approx(expected, rel=1e-4)
    again = evaluate(EvaluateConfig(name=str(tmp_path / "run"), device="cpu", resamples=0)).metrics
    assert again["ndcg@10"] == pytest.approx(found["metrics"]["ndcg@10"])
    assert np.isnan(again["loss"])  # evaluate runs no teacher


def test_a_run_does_not_resume_with_another_teacher(
    tiny_model_dir: ModelDir, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    own, model = tmp_path / "teacher", tiny_model_dir("bert", "mlm")
    shutil.copytree(teacher, own)
    train(_distill(model, own, folder, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-2")
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/summary.json").unlink()
    other = AutoModelForSequenceClassification.from_pretrained(own)
    with torch.no_grad():
        other.classifier.out_proj.bias += 1
    other.save_pretrained(own)
    resumed = _distill(
        model, own, folder, tmp_path / "run", output={"dir": str(tmp_path / "run"), "resume": True}
    )
    with pytest.raises(ConfigError, match=r"distillation\.teacher"):
        train(resumed)


@pytest.mark.parametrize("task", ["reranking", "embedding"])
def test_a_decoder_resumes_although_its_tokenizer_appends_eos(
    task: str, tiny_model_dir: ModelDir, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sections = {
        "task": task,
        "model": {"name_or_path": str(tiny_model_dir("llama", None)), "device": "cpu"},
        "data": {"dataset": str(folder / "lists.jsonl"), "validation_split": 0.2},
        "train": {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"},
    }
    train(TrainConfig.model_validate({**sections, "output": {"dir": str(out)}}))
    weights = (out / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints/checkpoint-2")
    shutil.rmtree(out / "adapter")
    (out / "summary.json").unlink()
    again = {"dir": str(out), "resume": True}
    train(TrainConfig.model_validate({**sections, "output": again}))
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == weights


def _same_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "label": 1} for row in _pairs(rows)]


BAD = {
    "alike": (_same_labels(_rows(4)), [], "all documents have label 1"),
    "graded": (
        [{**row, "label": 3 * row["label"]} for row in _pairs(_rows(4))],
        [],
        "--loss bce needs labels from 0 to 1, found 3",
    ),
    "single": (
        _pairs(_rows(4)),
        ["--loss", "ranknet"],
        "have no documents of different relevance. Use --loss bce, or add a relevant and an "
        "irrelevant document to each query.",
    ),
    "untaught": (_rows(4), ["--loss", "margin-mse"], "needs teacher scores"),
    "teacher": (
        _rows(4),
        ["--loss", "lce", "--teacher", "x"],
        "--teacher: --loss lce does not read it; margin-mse, mse do",
    ),
    "column": ([{"text": "a b"}], [], "do not say what to learn"),
    "weight": (_rows(4), ["--loss", "lce", "--pos-weight", "2"], "--pos-weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_weights_load(
    name: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, more, words = BAD[name]
    data = _write(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("ftlevel.training.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    command = ["train", "--model", str(tiny_model_dir("bert", "mlm")), "--task", "reranking"]
    command += ["--dataset", str(data), "--output-dir", str(tmp_path / "run"), *more]
    assert run(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]


def test_a_reranker_that_answers_yes_or_no_is_refused(
    tiny_model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder without a head for pairs; training would replace the score that it has."""
    data = _write(tmp_path / "rows.jsonl", _rows(4))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    own = ["--task", "reranking", "--dataset", str(data)]
    assert run(["predict", str(model), *own]) == 2
    assert "LlamaForCausalLM, which has no head" in capsys.readouterr().err.splitlines()[-1]
    modules = ["base.modules.transformer.Transformer", "cross_encoder.modules.LogitScore"]
    entries = [
        {"idx": i, "type": f"sentence_transformers.{name}"} for i, name in enumerate(modules)
    ]
    (model / "modules.json").write_text(json.dumps(entries))
    train_it = ["train", "--model", str(model), *own, "--output-dir", str(tmp_path / "run")]
    assert run(train_it) == 2
    assert "scores documents by the logits of two tokens" in capsys.readouterr().err
