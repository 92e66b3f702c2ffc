"""Meters of similarities: values and memory."""

from __future__ import annotations

import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ftlevel.evaluation.intervals import ExampleRecord
from ftlevel.evaluation.two_models import EvalSet
from ftlevel.extras.retrieval import evaluators
from ftlevel.extras.retrieval.config import EmbeddingConfig
from ftlevel.extras.retrieval.evaluation import QueryMeter, create_meters, step_losses
from ftlevel.extras.retrieval.metrics import resampled_precision
from ftlevel.extras.retrieval.objective import Embeddings
from ftlevel.extras.retrieval.rows import EncodedTexts, StepTexts


@pytest.mark.parametrize("loss", ["mnrl", "gist", "triplet", "margin-mse", "kl"])
def test_rows_without_a_positive_have_no_loss(loss: str) -> None:
    objective = Embeddings("ndcg@10", config=EmbeddingConfig(loss=loss), step_rows=2)
    labels = ((1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    step = StepTexts(tuple((3 * i, 3 * i + 1, 3 * i + 2) for i in range(4)), labels, ((),) * 4)
    first, second, *others = step_losses(objective, torch.eye(12), step)
    assert first is not None
    assert (second, others) == (None, [None, None])


def test_rows_have_losses_of_their_own() -> None:
    """The reference is the InfoNCE loss of each query, with the documents of its group."""
    vectors = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    step = StepTexts(tuple((2 * i, 2 * i + 1) for i in range(8)), ((1.0,),) * 8, ((),) * 8)
    objective = Embeddings("ndcg@10", config=EmbeddingConfig(loss="mnrl"), step_rows=4)
    normed = torch.nn.functional.normalize(vectors, dim=-1)
    expected = []
    for group in (range(4), range(4, 8)):
        scores = 20 * normed[[2 * i for i in group]] @ normed[[2 * i + 1 for i in group]].T
        expected += (-scores.log_softmax(1).diagonal()).tolist()
    assert step_losses(objective, vectors, step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "kind"), [("mnrl", "ranking"), ("cosent", "score"), ("contrastive", "class")]
)
def test_interval_of_loss_covers_as_many_rows_as_it_claims(loss: str, kind: Any) -> None:
    """Losses of rows vary between groups by chance; the interval must show how much."""
    generator = torch.Generator().manual_seed(1)
    rows, texts, labels = [], [], []
    for i in range(64):
        pair = kind != "class"
        texts.append((2 * i, 2 * i + 1) if pair else (2 * i,))
        labels.append((1.0,) if kind == "ranking" else (float(i % 5 if pair else i % 2),))
        rows.append(SimpleNamespace(row=i, cluster=None))
    step = StepTexts(tuple(texts), tuple(labels), ((),) * 64)
    objective = Embeddings(
        "ndcg@10" if kind == "ranking" else "ap", config=EmbeddingConfig(loss=loss), kind=kind,
        step_rows=8,
    )  # fmt: skip
    vectors = torch.randn(128, 4, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators, "distinct_texts", lambda _: ([None] * 128, step))
        patch.setattr(evaluators, "add_texts", lambda *_: ())
        patch.setattr(evaluators, "embed_texts", lambda *_: vectors)
        patch.setattr(evaluators.EmbeddingEvaluator, "text", lambda *_: "")
        record, tokenizer = ExampleRecord(objective), SimpleNamespace(pad_token_id=0)
        evaluator = evaluators.EmbeddingEvaluator(
            rows, tokenizer, "encoder", objective, "cpu", "float32", 8
        )
        metrics = evaluator.score(None, record)
    draws = record.resample(400, 0, None, "")["loss"]
    losses = np.array(step_losses(objective, vectors, step), dtype=float)
    units = losses if loss == "mnrl" else losses[::8]
    error = units.std() / len(units) ** 0.5
    assert draws.std() == pytest.approx(error, rel=0.15)
    assert draws.mean() == pytest.approx(metrics["loss"], abs=0.2 * error)
    assert (record.row_loss(3) is None) == (loss != "mnrl")


def test_loss_of_one_group_has_no_interval() -> None:
    record = ExampleRecord(Embeddings("ndcg@10"))
    meter = QueryMeter([{"ndcg@10": 1.0}])
    for row in range(4):
        record.add_row(row, 0.5, 1, meter)
        record.loss_groups[row] = 0
    assert "loss" not in record.resample(10, 0, None, "")


def test_query_of_several_rows_counts_once() -> None:
    step = StepTexts(((0, 1), (0, 2), (3, 4)), ((1.0,),) * 3, ((),) * 3)
    vectors = torch.tensor([[1, 0], [1, 0.1], [1, 0.2], [1, 0], [0, 1.0]])
    meters = create_meters(Embeddings("ndcg@10"), vectors, step, (None,))
    # Both documents of the first query are at the top; that of the second is the last of three.
    assert meters[0].pool(meters).compute(0.0)["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    assert meters[1].describe([])["mrr@10"] == 1


def test_last_single_text_is_compared_with_the_group_before() -> None:
    """Alone it has no pair, so its loss would be 0."""
    config = EmbeddingConfig(loss="contrastive")
    objective = Embeddings("ap", config=config, kind="class", step_rows=2)
    step = StepTexts(((0,), (1,), (2,)), ((1.0,), (2.0,), (1.0,)), ((),) * 3)
    vectors = torch.eye(4)[[0, 0, 1]]
    # Pairs (0, 1): classes differ, D = 0; (0, 2): equal, D = 1; (1, 2): differ, D = 1.
    assert step_losses(objective, vectors, step) == [pytest.approx((0.125 + 0.5 + 0) / 3)] * 3


@pytest.mark.parametrize("loss", ["gist", "triplet", "margin-mse", "kl"])
def test_models_are_compared_on_rows_that_lack_what_the_loss_needs(loss: str) -> None:
    rows = [
        EncodedTexts([i, 4, i + 1, 5], (label,), i, {}, (2, 2), (), (0, 0))
        for i, label in enumerate((1.0, 1.0, 0.0))
    ]
    states = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))

    def model(input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=states[input_ids])

    losses = [
        EvalSet(rows, Embeddings("ndcg@10", config=EmbeddingConfig(loss=name)), 0, "cpu").score(
            model, "float32"
        )
        for name in (loss, "mnrl")
    ]
    assert losses[0].loss == pytest.approx(losses[1].loss)


def test_classes_are_compared_in_pairs_without_an_object_per_pair() -> None:
    """500 texts have 124,750 pairs; a Python float for each takes more than 3 MB."""
    count = 500
    vectors = torch.nn.functional.normalize(torch.randn(count, 8))
    classes = np.arange(count) % 3
    labels = tuple((float(label),) for label in classes)
    step = StepTexts(tuple((at,) for at in range(count)), labels, ((),) * count, None)
    tracemalloc.start()
    meters = create_meters(Embeddings("ap", kind="class"), vectors, step, (None, 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 124_750 * 16
    first, second = np.triu_indices(count, 1)
    for suffix, dims in (("", 8), ("_dim_4", 4)):
        own = torch.nn.functional.normalize(vectors[:, :dims], dim=-1).numpy()
        similarities = (own @ own.T)[first, second]
        expected = average_precision_score(classes[first] == classes[second], similarities)
        found = meters[0].pool(meters).compute(0.0)[f"ap{suffix}"]
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("digits", [1, 7])
def test_resampled_precision_matches_drawn_pairs(digits: int) -> None:
    """Pairs of drawn texts are repeated as often as the text is drawn; with many ties or none."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 30)
    first, second = np.triu_indices(30, 1)
    labels = classes[first] == classes[second]
    scores = (rng.normal(size=len(first)) + labels).round(digits).astype(np.float32)
    compute = resampled_precision(scores, labels, first)
    for size in (1, 2, 30, 30, 30):
        drawn = rng.integers(0, 29, size)
        pairs = np.concatenate([np.flatnonzero(first == text) for text in drawn])
        found = compute(np.bincount(drawn, minlength=30))
        if len({*labels[pairs]}) == 1 or len({*scores[pairs]}) == 1:
            assert found is None
        else:
            assert found == pytest.approx(average_precision_score(labels[pairs], scores[pairs]))
    nothing = np.bincount([29], minlength=30)  # the last text has no pairs
    assert compute(nothing) is None
    assert resampled_precision(scores, ~labels & labels, first)(np.ones(30, int)) is None


def test_intervals_of_class_pairs_take_a_sort_for_all_draws() -> None:
    """Sorting 44,850 pairs for each of 200 draws takes 10 times as long."""
    count = 300
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    labels = tuple((float(at % 3),) for at in range(count))
    step = StepTexts(tuple((at,) for at in range(count)), labels, ((),) * count, None)
    objective = Embeddings("ap", kind="class")
    meters = create_meters(objective, vectors, step, (None,))
    record = ExampleRecord(objective)
    for at, meter in enumerate(meters):
        record.add_row(at, 0.0, 1, meter)
    generator = np.random.default_rng(3)
    start = time.process_time()
    expected = []
    for _ in range(20):
        sample = [meters[pick] for pick in generator.integers(0, count, count)]
        expected.append(meters[0].pool(sample).compute(0.0)["ap"])
    plain = time.process_time() - start
    start = time.process_time()
    draws = record.resample(200, 3, None, "")["ap"]
    assert time.process_time() - start < 4 * plain  # 10 times as many draws
    assert draws[:20] == pytest.approx(expected, abs=1e-9)
