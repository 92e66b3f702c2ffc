"""Compare metrics, reranking losses and saved files with sentence-transformers, ranx and MTEB.

    python -m venv VENV --system-site-packages
    VENV/bin/pip install sentence-transformers==6.2.0 ranx==0.3.21 mteb==2.26.24
    PYTHONPATH=src VENV/bin/python scripts/against_sentence_transformers.py metrics [RUN PAIRS]
    PYTHONPATH=src VENV/bin/python scripts/against_sentence_transformers.py losses
    PYTHONPATH=src VENV/bin/python scripts/against_sentence_transformers.py files RUN ROWS
    PYTHONPATH=src VENV/bin/python scripts/against_sentence_transformers.py mining MODEL PAIRS

`metrics`: metrics of `score_retrieval` and of the libraries for random vectors of 60 queries and
400 documents; with RUN, for vectors of PAIRS by sentence-transformers and `ftlevel evaluate`.
`losses`: loss and gradient of each loss for one batch of a tiny BERT. `files`: loads a run, adapter
or merged model in its library and compares its scores or vectors of ROWS with `ftlevel predict`.
`mining`: compares the negatives of `ftlevel mine` for pairs of anchor and positive: 5 of ranks
1-100 with a relative margin of 0.05. Prints one line per comparison; fails if one exceeds its
bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ftlevel import EvaluateConfig, evaluate
from ftlevel.data.encoding.collate import Collator
from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.retrieval import METRICS, score_retrieval
from ftlevel.tasks.reranking.losses import Lists, count_targets, sum_loss
from ftlevel.tasks.reranking.rows import PairEncoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

Line = tuple[str, float, float]
"""Name of the comparison, largest difference and its bound."""


# ---- metrics


def _vectors() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (torch.randn(n, 16, generator=generator) for n in (60, 400))
    rng = np.random.default_rng(0)
    relevant = [sorted(rng.choice(400, n, replace=False).tolist()) for n in [1] * 40 + [7] * 20]
    for query, documents in enumerate(
        relevant
    ):  # relevant documents are close, so that some are found
        corpus[documents[0]] += queries[query]
    return queries, corpus, relevant


def _vectors_of(run: Path, rows: Path) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(run / "adapter"), device="cpu")
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    documents = list(dict.fromkeys(pair["positive"] for pair in pairs))
    queries = model.encode_query([pair["anchor"] for pair in pairs], convert_to_tensor=True)
    corpus = model.encode_document(documents, convert_to_tensor=True)
    return queries, corpus, [[documents.index(pair["positive"])] for pair in pairs]


def compare_metrics(run: Path | None, rows: Path | None) -> Iterator[Line]:
    """Yield the difference of each metric's mean from that of each library."""
    if run and rows:
        queries, corpus, relevant = _vectors_of(run, rows)
        config = EvaluateConfig(name=str(run), dataset=str(rows), dtype="float32", base=False)
        actual, tolerance = evaluate(config).metrics, 5e-5
    else:
        queries, corpus, relevant = _vectors()
        actual, tolerance = score_retrieval(queries, corpus, relevant).means, 1e-9
    scores = (functional.normalize(queries) @ functional.normalize(corpus).T).numpy()
    for name, reference in (
        ("sentence-transformers", _by_evaluator(scores, relevant)),
        ("ranx", _by_ranx(scores, relevant)),
        ("scikit-learn", _by_sklearn(scores, relevant)),
        ("mteb", _by_mteb(queries, corpus, relevant)),
    ):
        for metric, value in reference.items():
            bound = (
                max(tolerance, 6e-6) if name == "mteb" else tolerance
            )  # MTEB rounds to five digits
            yield f"{metric} of {name}", abs(value - actual[metric]), bound


def _by_evaluator(scores: np.ndarray, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    evaluator = InformationRetrievalEvaluator(
        {str(i): "q" for i in range(len(scores))},
        {str(j): "d" for j in range(scores.shape[1])},
        {str(i): {str(j) for j in documents} for i, documents in enumerate(relevant)},
        precision_recall_at_k=[1, 10, 100],
        write_csv=False,
    )
    hits = [
        [{"corpus_id": str(j), "score": float(score)} for j, score in enumerate(row)]
        for row in scores
    ]
    metrics = evaluator.compute_metrics(hits)
    return {name: float(metrics[name.split("@")[0] + "@k"][int(name.split("@")[1])])
            for name in METRICS}  # fmt: skip


def _by_ranx(scores: np.ndarray, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    from ranx import Qrels, Run, evaluate

    qrels = Qrels(
        {f"q{i}": {f"d{j}": 1 for j in documents} for i, documents in enumerate(relevant)}
    )
    run = Run(
        {f"q{i}": {f"d{j}": float(s) for j, s in enumerate(row)} for i, row in enumerate(scores)}
    )
    names = [
        name for name in METRICS if name != "map@100"
    ]  # ranx divides by all relevant documents
    metrics = evaluate(qrels, run, names)
    return {name: float(metrics[name]) for name in names}


def _by_sklearn(scores: np.ndarray, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    from sklearn.metrics import ndcg_score

    gains = np.zeros(scores.shape)
    for row, documents in enumerate(relevant):
        gains[row, documents] = 1
    return {"ndcg@10": float(ndcg_score(gains, scores, k=10))}


def _by_mteb(
    queries: torch.Tensor, corpus: torch.Tensor, relevant: Sequence[Sequence[int]]
) -> dict[str, float]:
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    class Lookup(torch.nn.Module):
        """Returns the vector whose index is the text."""

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            features["sentence_embedding"] = features["vectors"]
            return features

    class FixedVectors(SentenceTransformer):  # type: ignore[misc]
        """A model with given vectors: texts are `q3` or `d17`."""

        def __init__(self) -> None:
            super().__init__(modules=[Lookup()], device="cpu")

        def encode(self, sentences: Any, **_: Any) -> Any:
            texts = [sentences] if isinstance(sentences, str) else list(sentences)
            tables = {"q": queries, "d": corpus}
            return torch.stack([tables[text[0]][int(text[1:])] for text in texts]).numpy()

        encode_query = encode_document = encode

    class Task(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="Numbers", description="-", dataset={"path": "none/none", "revision": "1"},
            type="Retrieval", category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", reference=None, date=None, domains=[], task_subtypes=[],
            license=None, annotations_creators=None, dialect=[], sample_creation=None,
            bibtex_citation="", modalities=["text"],
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            self.queries = {"test": {f"q{i}": f"q{i}" for i in range(len(queries))}}
            self.corpus = {"test": {f"d{j}": {"text": f"d{j}"} for j in range(len(corpus))}}
            self.relevant_docs = {
                "test": {f"q{i}": {f"d{j}": 1 for j in own} for i, own in enumerate(relevant)}
            }
            self.convert_v1_dataset_format_to_v2(1)
            self.data_loaded = True

    scores = mteb.evaluate(FixedVectors(), [Task()], cache=None)[0].scores["test"][0]
    return {name: float(scores[f"{name.split('@')[0]}_at_{name.split('@')[1]}"])
            for name in METRICS}  # fmt: skip


# ---- losses

DOCUMENTS = [["a b", "c d e", "f"], ["b c", "a"], ["d", "e f a", "b", "c"]]
LABELS = {
    "bce": [[1.0, 0.0, 0.0], [0.0, 1.0], [0.0, 1.0, 1.0, 0.0]],
    "listnet": [[2.0, 0.0, 1.0], [0.0, 1.0], [0.0, 1.0, 3.0, 0.0]],
    "margin-mse": [[1.0, 0.0, 0.0]] * 3,
}


def compare_losses() -> Iterator[Line]:
    """Yield the difference of loss and gradient of each loss, relative to its gradient."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import losses

    import tiny_models

    with tempfile.TemporaryDirectory() as directory:
        tiny_models.save_tiny(Path(directory), "bert")
        model = CrossEncoder(directory, num_labels=1, device="cpu")
    model.eval()
    model.model.double()  # margins cancel most of a gradient, and float32 rounds the rest
    model.model.classifier.weight.data.mul_(50)  # a new head's scores hardly differ
    queries = ["a c", "f e", "b"]
    lists = [queries, DOCUMENTS]
    teacher = [[2.0, 0.5, -1.0], [1.0, 0.0, 0.3], [0.2, 0.1, -0.4]]
    pairs = [(q, d) for q, own in zip(queries, DOCUMENTS, strict=True) for d in own]
    flat = [list(column) for column in zip(*pairs, strict=True)]
    two_negatives = [own[:2] + own[:1] for own in DOCUMENTS]
    columns = [queries, *map(list, zip(*two_negatives, strict=True))]
    graded = [torch.tensor(own) for own in LABELS["listnet"]]
    scores = torch.tensor([score for own in LABELS["listnet"] for score in own])
    weight = losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(3.0))
    binary = torch.tensor([label for own in LABELS["bce"] for label in own])
    for name, labels, documents, reference in (
        ("bce", LABELS["bce"], DOCUMENTS, weight(flat, binary)),
        ("mse", LABELS["listnet"], DOCUMENTS, losses.MSELoss(model)(flat, scores)),
        ("listnet", LABELS["listnet"], DOCUMENTS, losses.ListNetLoss(model)(lists, graded)),
        ("ranknet", LABELS["listnet"], DOCUMENTS, losses.RankNetLoss(model)(lists, graded)),
        ("lambda", LABELS["listnet"], DOCUMENTS, losses.LambdaLoss(model)(lists, graded)),
        ("margin-mse", LABELS["margin-mse"], two_negatives,
         losses.MarginMSELoss(model)(columns, torch.tensor(teacher))),
    ):  # fmt: skip
        expected_gradient = _gradient(model, reference)
        rows = [
            EmbeddingRow(q, index, tuple(own), tuple(label), teacher=tuple(teacher[index])
                         if name == "margin-mse" else ())
            for index, (q, own, label) in enumerate(zip(queries, documents, labels, strict=True))
        ]  # fmt: skip
        actual = _our_loss(model, name, rows)
        actual_gradient = _gradient(model, actual)
        size = float(expected_gradient.norm())
        yield f"loss {name}", abs(actual.item() - reference.item()), 1e-6
        yield f"gradient {name}", float((actual_gradient - expected_gradient).norm()) / size, 1e-5


def _our_loss(model: Any, name: str, rows: Sequence[EmbeddingRow]) -> torch.Tensor:
    batch = Collator(model.tokenizer.pad_token_id)(PairEncoder(model.tokenizer)(rows))
    lists = Lists.from_labels(batch.pop("labels"))
    logits = model.model(**batch).logits
    return sum_loss(name, logits, lists, 3.0) / count_targets(name, lists)


def _gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    torch.autograd.backward(loss)
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients).clone()


# ---- files


def compare_files(run: Path, rows: Path) -> Iterator[Line]:
    """Yield the largest difference of a score or a vector of ROWS."""
    directory = run / "adapter" if (run / "adapter").is_dir() else run
    with tempfile.TemporaryDirectory() as output_dir:
        out = Path(output_dir) / "predicted.jsonl"
        command = [sys.executable, "-m", "ftlevel", "predict", str(run), "--dataset", str(rows)]
        command += ["--output", str(out), "--dtype", "float32", "--json"]
        command += ["--overlong", "truncate-prompt"]
        subprocess.run(command, check=True, capture_output=True)
        predictions = [json.loads(line) for line in out.read_text().splitlines()]
    settings = json.loads((directory / "config_sentence_transformers.json").read_text())
    if settings["model_type"] == "CrossEncoder":
        from sentence_transformers import CrossEncoder

        model: Any = CrossEncoder(str(directory), device="cpu")
        pairs = [(row["query"], text) for row in predictions for text in _documents(row)]
        actual = [score for row in predictions for score in _as_list(row["prediction"])]
        reference = model.predict(pairs, show_progress_bar=False)
    else:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(directory), device="cpu")
        is_query = "query" in predictions[0]
        encode = model.encode_query if is_query else model.encode_document
        reference = encode([row["query" if is_query else "text"] for row in predictions])
        actual = [row["prediction"] for row in predictions]
    difference = np.abs(np.array(actual) - np.asarray(reference, dtype=np.float64)).max()
    yield f"{directory}, {len(predictions)} rows", float(difference), 1e-6


# ---- mining


def compare_mining(run: Path, rows: Path) -> Iterator[Line]:
    """Yield the share of rows whose negatives differ."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as output_dir:
        out = Path(output_dir) / "mined.jsonl"
        command = [sys.executable, "-m", "ftlevel", "mine", str(run), "--dataset", str(rows)]
        command += ["--out", str(out), "--dtype", "float32"]
        subprocess.run(command, check=True, capture_output=True)
        actual = [json.loads(line) for line in out.read_text().splitlines()]
    mined = mine_hard_negatives(
        Dataset.from_list(pairs).select_columns(["anchor", "positive"]),
        SentenceTransformer(str(run), device="cpu"),
        relative_margin=0.05,
        num_negatives=5,
        range_max=100,
        output_format="n-tuple",
        verbose=False,
    )
    reference = {row["anchor"]: [row[f"negative_{n}"] for n in range(1, 6)] for row in mined}
    same = [row["neg"] == reference[row["query"]] for row in actual if row["query"] in reference]
    yield f"rows with other negatives, of {len(same)}", 1 - sum(same) / len(same), 0.0


def _documents(row: dict[str, Any]) -> list[str]:
    return _as_list(row["documents"] if "documents" in row else row["document"])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def main() -> int:
    """Print the comparisons; return 1 if one is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["metrics", "losses", "files", "mining"])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("rows", type=Path, nargs="?")
    args = parser.parse_args()
    if args.what == "losses":
        lines = compare_losses()
    else:
        compare = {"metrics": compare_metrics, "files": compare_files, "mining": compare_mining}
        lines = compare[args.what](args.run, args.rows)
    over = 0
    for name, difference, bound in lines:
        over += not difference <= bound
        print(f"{name}: {difference:.1e}{'' if difference <= bound else f', over {bound:.0e}'}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
