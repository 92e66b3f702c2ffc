"""Embedding models: retrieval evaluation, predicted embeddings, mined negatives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

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
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieval")
    (directory / "qrels").mkdir()
    files = {
        "queries.jsonl": [{"_id": f"q{n}", "text": q} for n, (q, _) in enumerate(TEXTS)],
        "corpus.jsonl": [
            {"_id": f"d{n}", "title": "", "text": d} for n, (_, d) in enumerate(TEXTS)
        ],
        "pairs.jsonl": [{"anchor": q, "positive": d} for q, d in TEXTS],
        "one.jsonl": [{"anchor": q, "positive": "The only one."} for q, _ in TEXTS],
        "train.jsonl": [{"anchor": f"my {q}", "positive": f"{d} It is so."} for q, d in TEXTS],
    }
    for name, rows in files.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{n}\td{n}\t1" for n in range(len(TEXTS))]
    (directory / "qrels/test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
    )
    return directory


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tiny_model_dir: ModelDir) -> Path:
    config = TrainConfig.model_validate(
        {
            "task": "embedding",
            "model": {"name_or_path": str(tiny_model_dir("bert", "mlm")), "dtype": "float32"},
            "data": {
                "dataset": str(data_dir / "train.jsonl"),
                "validation_file": str(data_dir / "pairs.jsonl"),
            },
            "embedding": {"query_prompt": "find: ", "matryoshka_dims": [16]},
            "train": {"max_steps": 10, "learning_rate": 0.01},
            "output": {"dir": str(data_dir / "run")},
        }
    )
    train(config)
    return data_dir / "run"


def read_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_qrels_metrics_match_validation_metrics(
    run_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training_metrics = json.loads((run_dir / "summary.json").read_text())["metrics"]
    qrels = str(data_dir / "qrels/test.tsv")
    assert run(["evaluate", str(run_dir), "--qrels", qrels, "--device", "cpu", "--json"]) == 0
    result = read_json(capsys)
    for name in ("ndcg@10", "mrr@10", "recall@1", "map@100", "ndcg@10_dim_16"):
        assert result["metrics"][name] == pytest.approx(training_metrics[name], abs=1e-6)
    low, high = result["intervals"]["ndcg@10"]
    assert low <= result["metrics"]["ndcg@10"] <= high
    assert result["base"]["ndcg@10"] != result["metrics"]["ndcg@10"]


def test_corpus_metrics_match_validation_metrics(
    run_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["--corpus", str(data_dir / "corpus.jsonl"), "--device", "cpu", "--json", "--no-base"]
    for rows in ([], ["--dataset", str(data_dir / "pairs.jsonl")]):
        assert run(["evaluate", str(run_dir), *corpus, *rows]) == 0
        training_metrics = json.loads((run_dir / "summary.json").read_text())["metrics"]
        assert read_json(capsys)["metrics"]["ndcg@10"] == pytest.approx(
            training_metrics["ndcg@10"], abs=1e-6
        )


def test_rows_with_scores_are_evaluated_by_correlation(
    run_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was trained on pairs, whose metrics would take each score above 0 as relevant."""
    scores = [0.5 * (n % 5) for n in range(len(TEXTS))]
    rows = [
        {"sentence1": query, "sentence2": TEXTS[3 * n % 8][1], "score": score}
        for n, ((query, _), score) in enumerate(zip(TEXTS, scores, strict=True))
    ]
    data = tmp_path / "scores.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = [str(run_dir), "--dataset", str(data), "--device", "cpu"]
    assert run(["evaluate", *model, "--no-base", "--json"]) == 0
    found = read_json(capsys)
    vectors = []
    for role, column in (("query", "sentence1"), ("text", "sentence2")):
        out = ["--map", f"{role}={column}", "--output", str(tmp_path / f"{role}.npy")]
        assert run(["predict", *model, *out]) == 0
        vectors.append(np.load(tmp_path / f"{role}.npy"))
    expected = spearmanr((vectors[0] * vectors[1]).sum(1), scores)[0]
    assert (found["headline"], found["metrics"]["spearman"]) == (
        "spearman",
        pytest.approx(expected),
    )


def test_embeddings_are_equal_in_every_file_format(run_dir: Path, data_dir: Path) -> None:
    arrays = []
    for suffix in ("npy", "parquet", "jsonl"):
        out = data_dir / f"vectors.{suffix}"
        assert (
            run(
                [
                    "predict",
                    str(run_dir),
                    "--dataset",
                    str(data_dir / "queries.jsonl"),
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


def test_dims_option_truncates_and_normalizes(run_dir: Path, data_dir: Path) -> None:
    arrays = []
    for dims in ([], ["--dims", "16"], ["--dims", "16", "--no-normalize"]):
        out = data_dir / f"dims{len(arrays)}.npy"
        assert (
            run(
                [
                    "predict",
                    str(run_dir),
                    "--dataset",
                    str(data_dir / "corpus.jsonl"),
                    "--output",
                    str(out),
                    "--device",
                    "cpu",
                    *dims,
                ]
            )
            == 0
        )
        arrays.append(np.load(out))
    full, truncated, unnormalized = arrays
    assert truncated == pytest.approx(
        full[:, :16] / np.linalg.norm(full[:, :16], axis=1)[:, None], abs=1e-6
    )
    assert np.abs(np.linalg.norm(unnormalized, axis=1) - 1).min() > 1e-3
    assert unnormalized / np.linalg.norm(unnormalized, axis=1)[:, None] == pytest.approx(
        truncated, abs=1e-6
    )


def test_mined_negatives_are_other_documents(run_dir: Path, data_dir: Path) -> None:
    out = data_dir / "mined.jsonl"
    assert (
        run(
            [
                "mine",
                str(run_dir),
                "--dataset",
                str(data_dir / "pairs.jsonl"),
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
    positives = dict(TEXTS)
    assert rows
    for row in rows:
        assert row["pos"] == [positives[row["query"]]]
        assert row["pos"][0] not in row["neg"]
        assert set(row["neg"]) <= set(positives.values())


def test_mined_rows_keep_their_instructions(run_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Without them, training on the mined rows would use the model's own prompt."""
    rows = [{"query": q, "pos": [d], "prompt": f"{q[0]}: " * (q > "l")} for q, d in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["mine", str(run_dir), "--dataset", str(tmp_path / "rows.jsonl"), "--out"]
    out = tmp_path / "mined.jsonl"
    assert run([*command, str(out), "--relative-margin", "0", "--device", "cpu"]) == 0
    prompts = {row["query"]: row["prompt"] for row in rows}
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["prompt"] == "" for row in mined} == {True, False}
    assert all(row["prompt"] == prompts[row["query"]] for row in mined)


def test_file_is_kept_if_no_negative_is_found(
    run_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mined.jsonl"
    command = ["mine", str(run_dir), "--dataset", str(data_dir / "pairs.jsonl"), "--out", str(out),
               "--relative-margin", "0", "--negatives", "2", "--device", "cpu"]  # fmt: skip
    assert run([*command, "--json"]) == 0
    summary, rows = read_json(capsys), [json.loads(line) for line in out.open()]
    assert (summary["rows"], summary["left_out"]) == (len(rows), len(TEXTS) - len(rows))
    assert summary["negatives"] == sum(len(row["neg"]) for row in rows)
    assert run([*command, "--overwrite", "--ranks", "200-300"]) == 2
    assert [json.loads(line) for line in out.open()] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["mined.jsonl"]
    assert run([*command, "--overwrite", "--negatives", "1"]) == 0
    assert {len(json.loads(line)["neg"]) for line in out.open()} == {1}


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "--dataset", "corpus.jsonl", "--max-new-tokens", "5"),
        ("evaluate", "--max-new-tokens", "5"),
    ],
)
def test_decoding_has_no_effect(
    command: tuple[str, ...], run_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(data_dir / part) if part == "corpus.jsonl" else part for part in command[1:]]
    assert run([command[0], str(run_dir), *arguments, "--device", "cpu"]) == 0
    message = "--max-new-tokens has no effect: --task embedding generates no text"
    assert message in capsys.readouterr().err


INVALID_COMMANDS = {
    "split of qrels": (
        ["evaluate", "{run}", "--qrels", "{folder}/qrels/test.tsv", "--split", "test"],
        "--split cannot be used with --qrels. Drop one of them.",
    ),
    "map of qrels": (
        ["evaluate", "{run}", "--qrels", "{folder}/qrels/test.tsv", "--map", "query=text"],
        "--map cannot be used with --qrels. Drop one of them.",
    ),
    "subset of the run's data": (
        ["evaluate", "{run}", "--subset", "en"],
        "--subset en needs --dataset FILE. Add --dataset FILE, or drop --subset.",
    ),
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
    "reranker": (
        ["mine", "{reranker}", "--dataset", "{folder}/pairs.jsonl", "--out", "{out}.jsonl"],
        "reranker is a reranker. Name an embedding model.",
    ),
    "positives": (
        ["mine", "{run}", "--dataset", "{folder}/corpus.jsonl", "--out", "{out}.jsonl"],
        "no format matches the columns",
    ),
    "one document": (
        ["mine", "{run}", "--dataset", "{folder}/one.jsonl", "--out", "{out}.jsonl"],
        "one.jsonl has one distinct document, which is the positive of all rows. Add documents",
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


@pytest.mark.parametrize("name", INVALID_COMMANDS)
def test_invalid_command_is_reported(
    name: str,
    run_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    tiny_model_dir: ModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, message = INVALID_COMMANDS[name]
    paths = {"run": run_dir, "folder": data_dir, "out": tmp_path / "out"}
    paths["reranker"] = tmp_path / "reranker"
    if name == "reranker":  # a CrossEncoder without modules.json
        shutil.copytree(tiny_model_dir("bert", "seqcls", num_labels=1), paths["reranker"])
    assert run([argument.format(**paths) for argument in command]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
