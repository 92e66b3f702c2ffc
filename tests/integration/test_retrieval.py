"""Embedding models: retrieval evaluation, predicted embeddings, mined negatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftlevel.cli.app import run
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig

ModelDir = Callable[..., Path]
TEXTS = [
    ("file", "The name of the file."),
    ("string", "A value that is a string."),
    ("number", "The number of lines in the text."),
    ("parser", "Return the parser of the module."),
    ("class", "A class without a method."),
    ("line", "Read one line and return it."),
    ("list", "Append a value to the list."),
    ("error", "Raise an error if there is no name."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("retrieval")
    (place / "qrels").mkdir()
    files = {
        "queries.jsonl": [{"_id": f"q{n}", "text": q} for n, (q, _) in enumerate(TEXTS)],
        "corpus.jsonl": [
            {"_id": f"d{n}", "title": "", "text": d} for n, (_, d) in enumerate(TEXTS)
        ],
        "pairs.jsonl": [{"anchor": q, "positive": d} for q, d in TEXTS],
        "train.jsonl": [{"anchor": f"my {q}", "positive": f"{d} It is so."} for q, d in TEXTS],
    }
    for name, rows in files.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{n}\td{n}\t1" for n in range(len(TEXTS))]
    (place / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return place


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_model_dir: ModelDir) -> Path:
    config = TrainConfig.model_validate(
        {
            "task": "embedding",
            "model": {"name_or_path": str(tiny_model_dir("bert", "mlm")), "dtype": "float32"},
            "data": {
                "dataset": str(folder / "train.jsonl"),
                "validation_file": str(folder / "pairs.jsonl"),
            },
            "embedding": {"query_prompt": "find: ", "matryoshka_dims": [16]},
            "train": {"max_steps": 3, "learning_rate": 0.01},
            "output": {"dir": str(folder / "run")},
        }
    )
    train(config)
    return folder / "run"


def _json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_retrieval_set_gives_the_metrics_of_the_same_validation_rows(
    trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = json.loads((trained / "summary.json").read_text())["metrics"]
    qrels = str(folder / "qrels/test.tsv")
    assert run(["evaluate", str(trained), "--qrels", qrels, "--device", "cpu", "--json"]) == 0
    found = _json(capsys)
    for name in ("ndcg@10", "mrr@10", "recall@1", "map@100", "ndcg@10_dim_16"):
        assert found["metrics"][name] == pytest.approx(own[name], abs=1e-6)
    low, high = found["intervals"]["ndcg@10"]
    assert low <= found["metrics"]["ndcg@10"] <= high
    assert found["base"]["ndcg@10"] != found["metrics"]["ndcg@10"]


def test_the_corpus_of_the_same_documents_gives_the_same_metrics(
    trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["--corpus", str(folder / "corpus.jsonl"), "--device", "cpu", "--json", "--no-base"]
    for rows in ([], ["--dataset", str(folder / "pairs.jsonl")]):
        assert run(["evaluate", str(trained), *corpus, *rows]) == 0
        own = json.loads((trained / "summary.json").read_text())["metrics"]
        assert _json(capsys)["metrics"]["ndcg@10"] == pytest.approx(own["ndcg@10"], abs=1e-6)


def test_embeddings_are_the_same_in_every_file(trained: Path, folder: Path) -> None:
    arrays = []
    for suffix in ("npy", "parquet", "jsonl"):
        out = folder / f"vectors.{suffix}"
        assert (
            run(
                [
                    "predict",
                    str(trained),
                    "--dataset",
                    str(folder / "queries.jsonl"),
                    "--map",
                    "query=text",
                    "--output",
                    str(out),
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        if suffix == "npy":
            arrays.append(np.load(out))
        elif suffix == "parquet":
            arrays.append(np.array(pq.read_table(out)["prediction"].to_pylist(), np.float32))
        else:
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            arrays.append(np.array([row["prediction"] for row in rows], np.float32))
    assert arrays[0].shape == (len(TEXTS), 64)
    assert np.linalg.norm(arrays[0], axis=1) == pytest.approx(1, abs=1e-6)
    assert all(np.array_equal(arrays[0], other) for other in arrays[1:])


def test_fewer_dimensions_are_the_first_ones_with_length_1(trained: Path, folder: Path) -> None:
    found = []
    for dims in ([], ["--dims", "16"], ["--dims", "16", "--no-normalize"]):
        out = folder / f"dims{len(found)}.npy"
        assert (
            run(
                [
                    "predict",
                    str(trained),
                    "--dataset",
                    str(folder / "corpus.jsonl"),
                    "--output",
                    str(out),
                    "--device",
                    "cpu",
                    *dims,
                ]
            )
            == 0
        )
        found.append(np.load(out))
    whole, few, raw = found
    assert few == pytest.approx(
        whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1)[:, None], abs=1e-6
    )
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 1e-3
    assert raw / np.linalg.norm(raw, axis=1)[:, None] == pytest.approx(few, abs=1e-6)


def test_mined_rows_have_other_documents(trained: Path, folder: Path) -> None:
    out = folder / "mined.jsonl"
    assert (
        run(
            [
                "mine",
                str(trained),
                "--dataset",
                str(folder / "pairs.jsonl"),
                "--out",
                str(out),
                "--negatives",
                "2",
                "--relative-margin",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    known = dict(TEXTS)
    assert rows
    for row in rows:
        assert row["pos"] == [known[row["query"]]]
        assert row["pos"][0] not in row["neg"]
        assert set(row["neg"]) <= set(known.values())


BAD = {
    "dims": (
        ["predict", "{run}", "--dataset", "{folder}/corpus.jsonl", "--dims", "65"],
        "have 64 dimensions",
    ),
    "array": (
        ["predict", "{run}", "--dataset", "{folder}/corpus.jsonl", "--output", "{out}.npz"],
        "cannot write '.npz'",
    ),
    "corpus": (
        ["evaluate", "{run}", "--corpus", "{folder}/queries.jsonl"],
        "relevant documents that are not in the corpus: 8 of 8 validation rows",
    ),
    "positives": (
        ["mine", "{run}", "--dataset", "{folder}/corpus.jsonl", "--out", "{out}.jsonl"],
        "do not say what to mine",
    ),
    "ranks": (
        [
            "mine",
            "{run}",
            "--dataset",
            "{folder}/pairs.jsonl",
            "--out",
            "{out}.jsonl",
            "--ranks",
            "200-300",
        ],
        "no row has a negative at ranks 200-300",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, words = BAD[name]
    places = {"run": trained, "folder": folder, "out": tmp_path / "out"}
    assert run([part.format(**places) for part in command]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
