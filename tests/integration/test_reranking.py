"""`--task reranking`: encoders and decoders train, and transformers returns equal scores."""

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
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, MergeConfig, PredictConfig, TrainConfig
from ftlevel.errors import ConfigError, FtlevelError, InputError, RunError
from ftlevel.extras.serving.check import check_served
from ftlevel.extras.serving.config import CheckServedConfig, ExportConfig
from ftlevel.extras.serving.exporting import export
from sampling import sample

ModelDir = Callable[..., Path]
WORDS = "cat dog sun moon river stone bread wine horse bird tree leaf cloud rain snow fire".split()


def create_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return queries with one document that contains the query and two others."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        query, *others = (" ".join(rng.sample(WORDS, 3)) for _ in range(3))
        documents = [f"{query} {rng.choice(WORDS)}", *others]
        labels = [1, 0, 0]
        order = rng.sample(range(3), 3)
        rows.append(
            {
                "query": query,
                "documents": [documents[i] for i in order],
                "labels": [labels[i] for i in order],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def to_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"query": row["query"], "document": document, "label": label}
        for row in rows
        for document, label in zip(row["documents"], row["labels"], strict=True)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reranking")
    write_rows(directory / "lists.jsonl", create_rows(24))
    write_rows(directory / "held_out.jsonl", create_rows(8, 1))
    write_rows(directory / "pairs.jsonl", to_pairs(create_rows(24)))
    write_rows(directory / "held_out_pairs.jsonl", to_pairs(create_rows(8, 1)))
    return directory


TrainedRun = tuple[Path, Any]


@pytest.fixture(scope="module")
def train_once(data_dir: Path, tiny_model_dir: ModelDir) -> Callable[[str, str], TrainedRun]:
    """Train once for each family and loss."""
    runs: dict[tuple[str, str], TrainedRun] = {}

    def train_run(family: str, loss: str) -> TrainedRun:
        if (family, loss) not in runs:
            suffix = "" if loss == "lce" else "_pairs"
            data = "lists" if loss == "lce" else "pairs"
            out = data_dir / f"{family}-{loss}"
            model = tiny_model_dir(family, "mlm" if family == "bert" else None)
            config = TrainConfig.model_validate(
                {
                    "task": "reranking",
                    "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
                    "data": {
                        "dataset": str(data_dir / f"{data}.jsonl"),
                        "validation_file": str(data_dir / f"held_out{suffix}.jsonl"),
                    },
                    "reranking": {"loss": None if loss == "lce" else loss},
                    "train": {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 1},
                    "output": {"dir": str(out)},
                }
            )
            runs[family, loss] = out, train(config).summary
        return runs[family, loss]

    return train_run


CELLS = [("bert", "lce"), ("llama", "lce"), ("bert", "bce"), ("llama", "bce")]


def reference_scores(model: Any, directory: Path, *, bce: bool) -> list[float]:
    """Return the scores of the held-out pairs, computed with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for row in create_rows(8, 1):
        for document in row["documents"]:
            inputs = tokenizer(row["query"], document, return_tensors="pt")
            with torch.no_grad():
                logit = model.eval()(**inputs).logits[0, 0]
            scores.append(float(logit.sigmoid() if bce else logit))
    return scores


def predict_scores(name: Path, data_dir: Path, file: str) -> list[float]:
    config = PredictConfig(
        name=str(name), dataset=str(data_dir / f"{file}.jsonl"), dtype="float32", device="cpu"
    )
    rows = predict(config).rows or []
    return [score for row in rows for score in np.atleast_1d(row["prediction"]).tolist()]


@pytest.mark.parametrize(("family", "loss"), sample(CELLS))
def test_predicted_scores_match_transformers_and_merged_model(
    family: str,
    loss: str,
    train_once: Callable[[str, str], TrainedRun],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    out, summary = train_once(family, loss)
    assert summary["data"]["reranking"]["loss"] == loss
    assert {"loss", "ndcg@10", "mrr@10", "map"} <= set(summary["metrics"])
    assert 0 < summary["metrics"]["ndcg@10"] <= 1
    assert summary["proof"]["adapter_effect"] > 1e-3
    adapter, bce = out / "adapter", loss == "bce"
    ours = predict_scores(out, data_dir, "held_out" if loss == "lce" else "held_out_pairs")
    card = json.loads((adapter / "ftlevel.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(card["base"]["name"], num_labels=1)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(adapter).pad_token_id
    assert ours == pytest.approx(
        reference_scores(PeftModel.from_pretrained(base, adapter), adapter, bce=bce), abs=1e-5
    )
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    merged_model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert ours == pytest.approx(reference_scores(merged_model, merged, bce=bce), abs=1e-5)
    for directory in (adapter, merged):
        settings = json.loads((directory / "config_sentence_transformers.json").read_text())
        assert settings["model_type"] == "CrossEncoder"
        assert settings["activation_fn"].endswith("Sigmoid" if bce else "Identity")
    config = json.loads((merged / "config.json").read_text())
    del config["sentence_transformers"]  # sentence-transformers 5 and 6 do not write it
    (merged / "config.json").write_text(json.dumps(config))
    (merged / "ftlevel.json").unlink()
    file = "held_out" if loss == "lce" else "held_out_pairs"
    assert predict_scores(merged, data_dir, file) == pytest.approx(ours, abs=1e-5)


def test_predictions_show_the_relevant_document_and_the_best_negative(
    train_once: Callable[[str, str], TrainedRun],
) -> None:
    out, _ = train_once("bert", "lce")
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    for line, row in zip(lines, create_rows(8, 1), strict=True):
        scores = [
            score for score, label in zip(line["scores"], line["labels"], strict=True) if not label
        ]
        negatives = [
            text for text, label in zip(row["documents"], row["labels"], strict=True) if not label
        ]
        texts = {
            "query": row["query"],
            "document": row["documents"][row["labels"].index(1)],
            "retrieved": negatives[scores.index(max(scores))],
        }
        assert {name: line[name].split() for name in texts} == {
            name: text.split() for name, text in texts.items()
        }


@pytest.mark.parametrize(("family", "loss"), [("bert", "lce"), ("llama", "bce")])
def test_evaluation_matches_metrics_of_training(
    family: str, loss: str, train_once: Callable[[str, str], TrainedRun]
) -> None:
    out, summary = train_once(family, loss)
    evaluation = evaluate(EvaluateConfig(name=str(out), device="cpu", resamples=50))
    for name in ("loss", "ndcg@10", "mrr@10", "map"):
        assert evaluation.metrics[name] == pytest.approx(summary["metrics"][name], abs=1e-5)
    low, high = evaluation.summary["intervals"]["ndcg@10"]
    assert low <= evaluation.metrics["ndcg@10"] <= high


def test_decoder_tokenizer_separates_query_and_document(
    train_once: Callable[[str, str], TrainedRun],
) -> None:
    adapter = train_once("llama", "lce")[0] / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("cat", "dog")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert "\n" in tokenizer.decode(ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_lists_and_pairs_have_equal_metrics(
    train_once: Callable[[str, str], TrainedRun], data_dir: Path
) -> None:
    """Documents of a query are ranked together, also across rows."""
    out, _ = train_once("bert", "lce")
    metrics = [
        evaluate(
            EvaluateConfig(
                name=str(out), dataset=str(data_dir / f"{name}.jsonl"), device="cpu", resamples=0
            )
        ).metrics
        for name in ("held_out", "held_out_pairs")
    ]
    for name in ("ndcg@10", "mrr@10", "map", "average_precision"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-6)


def serve_rerank(model: Any, tokenizer: Any, api: str) -> Iterator[str]:
    """Answer /rerank as vLLM ("results") or text-embeddings-inference ("texts") does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = []
            for index, text in enumerate(request["documents" if api == "results" else "texts"]):
                inputs = tokenizer(request["query"], text, return_tensors="pt")
                with torch.no_grad():
                    logit = model(**inputs).logits[0, 0]
                raw = api == "texts" and request["raw_scores"]
                name = "relevance_score" if api == "results" else "score"
                rows.append({"index": index, name: float(logit if raw else logit.sigmoid())})
            rows = sorted(rows, key=lambda row: -list(row.values())[1])
            body = json.dumps({"results": rows} if api == "results" else rows).encode()
            self.send_response(200 if self.path == "/rerank" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("server", "api"), [("vllm", "results"), ("tei", "texts")])
def test_check_served_compares_scores_of_server(
    server: str, api: str, train_once: Callable[[str, str], TrainedRun], tmp_path: Path
) -> None:
    out = tmp_path / "served"
    export(ExportConfig(model=str(train_once("bert", "bce")[0]), out=out, server=server))
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    for url in serve_rerank(model, AutoTokenizer.from_pretrained(out), api):
        summary = check_served(CheckServedConfig(out=out, url=url)).summary
        assert summary["max_difference"] < 1e-5
        with torch.no_grad():
            model.classifier.bias += 1
        with pytest.raises(RunError, match="not those of training"):
            check_served(CheckServedConfig(out=out, url=url))


@pytest.mark.parametrize(
    ("family", "message"), [("bert", "the segment of the query"), ("llama", "has no tensor for")]
)
def test_reranker_export_to_gguf_raises(
    family: str, message: str, train_once: Callable[[str, str], TrainedRun], tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    with pytest.raises(InputError, match=message):
        export(ExportConfig(model=str(train_once(family, "bce")[0]), out=out, format="gguf"))
    with pytest.raises(FtlevelError, match=r"llama\.cpp"):
        export(ExportConfig(model=str(train_once(family, "bce")[0]), out=out, server="llama.cpp"))


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: ModelDir) -> Path:
    """A cross-encoder with another tokenizer than the student's."""
    return tiny_model_dir("roberta", "seqcls", num_labels=1)


def create_distillation_config(
    model: Path, teacher: Path, data_dir: Path, out: Path, **sections: Any
) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "task": "reranking",
            "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
            "data": {
                "dataset": str(data_dir / "lists.jsonl"),
                "validation_file": str(data_dir / "held_out.jsonl"),
            },
            "distillation": {"teacher": str(teacher)},
            "train": {"max_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 1},
            "output": {"dir": str(out)},
            **sections,
        }
    )


@pytest.mark.parametrize("loss", [None, "mse"])
def test_distillation_loss_matches_reference(
    loss: str | None, tiny_model_dir: ModelDir, teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The reference is the formula over the scores of both models from transformers."""
    model = tiny_model_dir("bert", "mlm")
    config = create_distillation_config(
        model, teacher, data_dir, tmp_path / "run", reranking={"loss": loss}
    )
    summary = train(config).summary
    assert summary["data"]["reranking"]["loss"] == (loss or "margin-mse")
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(tmp_path / "run")], output_dir=merged, device="cpu"))
    student_scores, teacher_scores = (
        np.array(
            reference_scores(
                AutoModelForSequenceClassification.from_pretrained(directory), directory, bce=False
            )
        ).reshape(8, 3)
        for directory in (merged, teacher)
    )
    if loss == "mse":
        expected = np.mean((student_scores - teacher_scores) ** 2)
    else:
        margins = [
            (student[positive] - student[negative]) - (taught[positive] - taught[negative])
            for row, student, taught in zip(
                create_rows(8, 1), student_scores, teacher_scores, strict=True
            )
            for positive in range(3)
            for negative in range(3)
            if row["labels"][positive] > row["labels"][negative]
        ]
        expected = np.mean(np.square(margins))
    assert summary["metrics"]["loss"] == pytest.approx(expected, rel=1e-4)
    metrics = evaluate(
        EvaluateConfig(name=str(tmp_path / "run"), device="cpu", resamples=0)
    ).metrics
    assert metrics["ndcg@10"] == pytest.approx(summary["metrics"]["ndcg@10"])
    assert np.isnan(metrics["loss"])  # evaluate does not run the teacher


def test_resume_with_changed_teacher_raises(
    tiny_model_dir: ModelDir, teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    teacher_dir, model = tmp_path / "teacher", tiny_model_dir("bert", "mlm")
    shutil.copytree(teacher, teacher_dir)
    train(create_distillation_config(model, teacher_dir, data_dir, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-2")
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/summary.json").unlink()
    changed_teacher = AutoModelForSequenceClassification.from_pretrained(teacher_dir)
    with torch.no_grad():
        changed_teacher.classifier.out_proj.bias += 1
    changed_teacher.save_pretrained(teacher_dir)
    resumed = create_distillation_config(
        model,
        teacher_dir,
        data_dir,
        tmp_path / "run",
        output={"dir": str(tmp_path / "run"), "resume": True},
    )
    with pytest.raises(ConfigError, match=r"distillation\.teacher"):
        train(resumed)


@pytest.mark.parametrize("task", ["reranking", "embedding"])
def test_decoder_with_eos_tokenizer_resumes(
    task: str, tiny_model_dir: ModelDir, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sections = {
        "task": task,
        "model": {"name_or_path": str(tiny_model_dir("llama", None)), "device": "cpu"},
        "data": {"dataset": str(data_dir / "lists.jsonl"), "validation_split": 0.2},
        "train": {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"},
    }
    train(TrainConfig.model_validate({**sections, "output": {"dir": str(out)}}))
    weights = (out / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints/checkpoint-2")
    shutil.rmtree(out / "adapter")
    (out / "summary.json").unlink()
    resume = {"dir": str(out), "resume": True}
    train(TrainConfig.model_validate({**sections, "output": resume}))
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == weights


def with_equal_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "label": 1} for row in to_pairs(rows)]


INVALID_INPUTS = {
    "equal labels": (with_equal_labels(create_rows(4)), [], "all documents have label 1"),
    "graded": (
        [{**row, "label": 3 * row["label"]} for row in to_pairs(create_rows(4))],
        [],
        "--loss bce needs labels from 0 to 1, found 3",
    ),
    "no irrelevant one": (
        [{**row, "labels": [n + 1 for n in range(len(row["labels"]))]} for row in create_rows(4)],
        [],
        "--loss lce compares documents with labels above 0 with others, and 4 of 4 rows",
    ),
    "single": (
        to_pairs(create_rows(4)),
        ["--loss", "ranknet"],
        "have no documents of different relevance. Use --loss bce, or add a relevant and an "
        "irrelevant document to each query.",
    ),
    "no teacher": (create_rows(4), ["--loss", "margin-mse"], "needs teacher scores"),
    "teacher": (
        create_rows(4),
        ["--loss", "lce", "--teacher", "x"],
        "--teacher has no effect with --loss lce: it is for margin-mse, mse",
    ),
    "no documents": (
        [*create_rows(4), {"query": "a b", "documents": [], "labels": []}],
        [],
        "rows.jsonl:5: 'documents' has no text",
    ),
    "column": ([{"text": "a b"}], [], "no format matches the columns"),
    "weight": (create_rows(4), ["--loss", "lce", "--pos-weight", "2"], "--pos-weight"),
    "weight of default loss": (create_rows(4), ["--pos-weight", "2"], "no effect with --loss lce"),
}


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_invalid_input_is_reported_before_loading(
    name: str,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, options, message = INVALID_INPUTS[name]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("ftlevel.training.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    command = ["train", "--model", str(tiny_model_dir("bert", "mlm")), "--task", "reranking"]
    command += ["--dataset", str(data), "--output-dir", str(tmp_path / "run"), *options]
    assert run(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]


def test_overlong_documents_raise_or_are_truncated(
    tiny_model_dir: ModelDir, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--model", str(tiny_model_dir("bert", "mlm")), "--task", "reranking"]
    command += ["--dataset", str(data_dir / "lists.jsonl"), "--max-length", "12"]
    command += ["--max-steps", "1", "--output-dir", str(out), "--device", "cpu"]
    assert run(command) == 2
    assert "or pass --overlong drop or truncate." in capsys.readouterr().err
    assert run([*command, "--overlong", "truncate"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["shortened"] > 0


def test_predict_and_evaluate_cut_pairs_as_training_does(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The reference cuts the query at half of 16 tokens, then the document, by hand."""
    rng = random.Random(2)
    rows = [
        {
            "query": " ".join(rng.choices(WORDS, k=14)),
            "documents": [" ".join(rng.choices(WORDS, k=size)) for size in (15, 18)],
            "labels": [1, 0],
        }
        for _ in range(13)
    ]
    data, out = write_rows(tmp_path / "rows.jsonl", rows[5:]), tmp_path / "run"
    rows = rows[:5]
    config = TrainConfig.model_validate(
        {
            "task": "reranking",
            "model": {"name_or_path": str(tiny_model_dir("bert", "mlm")), "dtype": "float32"},
            "data": {
                "dataset": str(data),
                "validation_file": str(write_rows(tmp_path / "held_out.jsonl", rows)),
                "max_length": 16,
                "overlong": "truncate",
            },
            "train": {"max_steps": 2, "learning_rate": 0.01},
            "output": {"dir": str(out)},
        }
    )
    train(config)
    merged = tmp_path / "merged"
    merge(MergeConfig(adapters=[str(out)], output_dir=merged, device="cpu"))
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    expected = []
    for row in rows:
        query = tokenizer(row["query"])["input_ids"]
        query = query if len(query) <= 8 else [*query[:6], *query[-2:]]
        for document in row["documents"]:
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            room = 16 - len(query)
            ids = [*ids[: room - 1], tokenizer.sep_token_id]
            types = [0] * len(query) + [1] * len(ids)
            with torch.no_grad():
                inputs = torch.tensor([query + ids]), torch.ones(1, 16), torch.tensor([types])
                expected.append(model(*inputs).logits.item())
    for name in (out, merged):
        request = PredictConfig(name=str(name), dtype="float32", overlong="truncate")
        scores = [score for row in predict(request, rows).rows or [] for score in row["prediction"]]
        assert scores == pytest.approx(expected, abs=1e-5)
        lengths = json.loads((merged / "sentence_bert_config.json").read_text())
        assert lengths["max_seq_length"] == 16
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    shown = [score for line in lines for score in line["scores"]]
    assert shown == pytest.approx(expected, abs=1e-3)
    held_out = str(tmp_path / "held_out.jsonl")
    for name, dataset, count in ((out, None, 5), (out, str(data), 8), (merged, held_out, 5)):
        evaluation = evaluate(EvaluateConfig(name=str(name), dataset=dataset, resamples=0))
        assert evaluation.summary["data"]["examples"] == count


def test_yes_no_reranker_is_rejected(
    tiny_model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder without a score head; training would replace its score by yes and no tokens."""
    data = write_rows(tmp_path / "rows.jsonl", create_rows(4))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    options = ["--task", "reranking", "--dataset", str(data)]
    assert run(["predict", str(model), *options]) == 2
    assert "LlamaForCausalLM, which has no head" in capsys.readouterr().err.splitlines()[-1]
    modules = ["base.modules.transformer.Transformer", "cross_encoder.modules.LogitScore"]
    entries = [
        {"idx": i, "type": f"sentence_transformers.{name}"} for i, name in enumerate(modules)
    ]
    (model / "modules.json").write_text(json.dumps(entries))
    command = ["train", "--model", str(model), *options, "--output-dir", str(tmp_path / "run")]
    assert run(command) == 2
    assert "scores documents by the logits of two tokens" in capsys.readouterr().err
