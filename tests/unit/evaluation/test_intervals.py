"""Bootstrap intervals: of the size of the binomial interval, and paired between two models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tiny_tokenizers
from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.intervals import ExampleRecord, interval
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.extras.retrieval.pairs import RankedRow
from ftlevel.tasks import TASKS

CLASSES = TASKS["text-classification"].create_objective("encoder", {})


def make_record(is_correct: list[bool], confidence: float = 2.0) -> ExampleRecord:
    """Return a record of a two-class model whose rows are correct as in `right`."""
    result = ExampleRecord(CLASSES)
    rows = [Encoded([1], 0, index) for index in range(len(is_correct))]
    logits = torch.tensor([[confidence, 0.0] if ok else [0.0, confidence] for ok in is_correct])
    labels, mask = torch.zeros(len(is_correct), dtype=torch.long), torch.ones(len(is_correct), 1)
    result.add(rows, logits, labels, mask)
    return result


def test_interval_matches_binomial_interval():
    is_correct = [index % 4 != 0 for index in range(400)]  # 75 %
    draws = make_record(is_correct).resample(300, 0, None, "")
    low, high = interval(draws["accuracy"])
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.012)
    assert high == pytest.approx(0.75 + half, abs=0.012)
    assert draws["accuracy"].mean() == pytest.approx(0.75, abs=0.005)


def test_resamples_are_paired_between_models():
    is_correct = [index % 3 != 0 for index in range(60)]
    worse = [ok and index % 5 != 1 for index, ok in enumerate(is_correct)]
    first, second = (make_record(r).resample(40, 7, None, "") for r in (is_correct, worse))
    assert (first["accuracy"] >= second["accuracy"]).all()
    same = make_record(is_correct).resample(40, 7, None, "")
    assert np.array_equal(first["accuracy"], same["accuracy"])
    assert not np.array_equal(
        first["accuracy"], make_record(is_correct).resample(40, 8, None, "")["accuracy"]
    )


def test_draws_of_queries_do_not_depend_on_the_order_of_scoring():
    objective = TASKS["reranking"].create_objective("encoder", TASKS["reranking"].synthetic_info)
    rows = [RankedRow([i, 9, 8], 0, i, {}, 1, (1, 1), (1.0, 0.0), (1.0, 0.0)) for i in range(6)]

    def draw(order: list[int]) -> np.ndarray:
        record = ExampleRecord(objective)
        for i in order:
            logits = torch.tensor([[1.0], [i - 2.5]])
            labels = torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
            record.add([rows[i]], logits, labels, torch.ones(2, 2))
        return record.resample(20, 0, None, "")["mrr@10"]

    assert np.array_equal(draw([0, 1, 2, 3, 4, 5]), draw([5, 2, 0, 4, 1, 3]))


def test_metrics_of_all_rows_match_meter():
    per_row = make_record([True, True, False, True])
    units = [per_row.units[row] for row in sorted(per_row.units)]
    metrics = ExampleRecord._metrics(units, np.arange(4))
    meter = CLASSES.meter()
    meter.update(torch.tensor([[2.0, 0], [2.0, 0], [0, 2.0], [2.0, 0]]), torch.zeros(4), [])
    assert metrics == pytest.approx({"loss": metrics["loss"], **meter.compute(0.0)})
    expected = (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_text_keeps_masks_but_no_other_special_tokens():
    tokenizer = tiny_tokenizers.bert_tokenizer()
    objective = TASKS["masked-lm"].create_objective("encoder", {})
    evaluator = Evaluator([], tokenizer, "encoder", objective, "cpu", "float32", 2)
    ids = tokenizer("the value [MASK] the list")["input_ids"]
    assert evaluator.text(Encoded(ids, ids, 0)).split("[MASK]")[1].split() == ["the", "list"]
    assert "[SEP]" not in evaluator.text(Encoded(ids, ids, 0))


def test_chunked_tokens_are_assigned_to_rows():
    objective = TASKS["text-generation"].create_objective("decoder", {})
    rows = [Encoded([1, 2, 3], [1, 2, 3], 5), Encoded([4, 5], [4, 5], 6)]
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    evaluator = Evaluator(rows, None, "decoder", objective, "cpu", "float32", 2)
    scores, targets = torch.randn(3, 9), torch.tensor([2, 3, 5])
    records = []
    for chunk_sizes in ([3], [1, 2], [2, 1]):
        record = ExampleRecord(objective)
        observe = evaluator._observer(objective.meter(), record, rows, labels)
        for chunk_scores, chunk_targets in zip(
            scores.split(chunk_sizes), targets.split(chunk_sizes), strict=True
        ):
            observe(chunk_scores, chunk_targets)
        records.append({row: (unit.targets, unit.loss) for row, unit in record.units.items()})
    assert {row: count for row, (count, _) in records[0].items()} == {5: 2, 6: 1}
    for other in records[1:]:
        assert other.keys() == records[0].keys()
        assert all(other[row] == pytest.approx(records[0][row]) for row in other)
