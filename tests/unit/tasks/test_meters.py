from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftlevel.data.encoding.spans import TaggedRow, Window
from ftlevel.data.formats.examples import TaggedTokens
from ftlevel.tasks.base import OutputOptions
from ftlevel.tasks.classes import ClassMeter, MultiLabelMeter, RegressionMeter
from ftlevel.tasks.losses import TokenMeter
from ftlevel.tasks.span import SpanMeter
from ftlevel.tasks.tags import TASKS, TagMeter
from tiny_tokenizers import build_tokenizer


def test_token_meter():
    meter = TokenMeter("pseudo_perplexity", "masked_accuracy")
    meter.update(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 1, 0]), [])
    assert meter.compute(math.log(8)) == pytest.approx(
        {"pseudo_perplexity": 8.0, "masked_accuracy": 2 / 3}
    )


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_class_meter_matches_sklearn(classes):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    draw = random.Random(classes)
    meter = ClassMeter()
    true, predicted = ([draw.randrange(classes) for _ in range(12)] for _ in range(2))
    meter.update(torch.eye(classes)[predicted], torch.tensor(true), [])
    assert meter.compute(0.0) == pytest.approx({
        "accuracy": accuracy_score(true, predicted),
        "f1": f1_score(true, predicted, average="macro", zero_division=0),
        "mcc": matthews_corrcoef(true, predicted),
    })  # fmt: skip


def test_multi_label_meter():
    meter = MultiLabelMeter()
    meter.update(
        torch.tensor([[1.0, -1, 1], [-1, -1, -1]]), torch.tensor([[1.0, 0, 0], [0, 0, 0]]), []
    )
    # label 1: TP 1; label 2: nothing; label 3: FP 1. Micro: 2·1 / (2·1 + 1)
    expected = {"micro_f1": 2 / 3, "macro_f1": 1 / 3, "subset_accuracy": 0.5}
    assert meter.compute(0.0) == pytest.approx(expected)


def test_multi_label_meter_of_one_label_ignores_rows_without_it():
    meter = MultiLabelMeter()
    meter.update(torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [0], [0], [0]]), [])
    assert meter.compute(0.0) == pytest.approx(
        {"micro_f1": 2 / 3, "macro_f1": 2 / 3, "subset_accuracy": 0.75}
    )


def test_regression_meter():
    meter = RegressionMeter()
    meter.update(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([1.0, 2.0, 3.0]), [])
    scores = meter.compute(12.0)
    assert scores["rmse"] == pytest.approx(math.sqrt(12))
    assert scores["spearman"] == pytest.approx(1.0)
    # x − 4 = −3 −2 5; y − 2 = −1 0 1: 8 / √(38 · 2)
    assert scores["pearson"] == pytest.approx(8 / math.sqrt(76))


def test_regression_meter_of_constant_has_no_correlation():
    meter = RegressionMeter()
    meter.update(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 2.0]), [])
    assert meter.compute(0.5) == pytest.approx({"rmse": math.sqrt(0.5)})


def test_tag_meter_counts_words_without_token():
    names = ["B-X", "O"]
    row = TaggedRow([5, 6, 7], [-100, 0, -100], 0, {}, (0, 0, 1), (1, None, 2))
    meter = TagMeter(names)
    meter.update(torch.eye(2)[[1, 0, 1]][None], torch.tensor([row.labels]), [row])
    assert meter.true == [["B-X", "B-X", "O"]]
    assert meter.predicted == [["B-X", "O", "O"]]
    assert meter.compute(0.0) == pytest.approx(
        {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "accuracy": 2 / 3}
    )


def test_tag_meter_without_entity_tags_reports_macro_f1():
    row = TaggedRow([5, 6], [0, 1], 0, {}, (0, 1), (0, 1))
    meter = TagMeter(["NOUN", "VERB"])
    meter.update(torch.eye(2)[[0, 0]][None], torch.tensor([row.labels]), [row])
    assert meter.compute(0.0) == pytest.approx({"f1": (2 / 3 + 0) / 2, "accuracy": 0.5})


def test_macro_f1_has_no_class_for_words_without_token():
    from sklearn.metrics import f1_score

    row = TaggedRow([5, 6], [0, 1], 0, {}, (0, 1, 1), (0, 1, None))
    meter = TagMeter(["NOUN", "VERB"])
    meter.update(torch.eye(2)[None], torch.tensor([row.labels]), [row])
    expected = f1_score([0, 1, 1], [0, 1, 2], labels=[0, 1], average="macro")
    assert meter.compute(0.0) == pytest.approx({"f1": expected, "accuracy": 2 / 3})


@pytest.mark.parametrize(
    ("labels", "missing"),
    [(["NOUN", "VERB"], None), (["NOUN", "O"], "O"), (["B-X", "I-X"], "O")],
)
def test_word_without_token_gets_no_tag_unless_there_is_o(labels, missing):
    (task,) = TASKS
    tokenizer = build_tokenizer("bert", None)
    logits = torch.tensor([[1.0, 0.0]])
    model: Any = SimpleNamespace(
        tokenizer=tokenizer,
        labels=labels,
        score=lambda rows, read: [read(row, logits.repeat(len(row.input_ids), 1)) for row in rows],
    )
    query = TaggedTokens(("object", "\u200b"), (), 0)
    (prediction,) = task.predict(model, [query], OutputOptions())
    assert prediction.columns[""] == [labels[0], missing]
    assert prediction.text == f"object/{labels[0]} \u200b"


def test_span_meter_scores_each_question_once():
    offsets = ((0, 3), (4, 7))
    rows = [
        Window([0] * 3, (1, 1), index, {}, "red sky", answers, 1, offsets)
        for index, answers in ((0, (("red", 0),)), (0, (("red", 0),)), (1, (("sky", 4),)))
    ]
    logits = torch.zeros(3, 3, 2)
    logits[0, 1] = 5.0  # "red" in the first window of question 0
    logits[1, 2] = 1.0
    logits[2, 1, 0] = logits[2, 2, 1] = 3.0  # "red sky" for "sky"
    meter = SpanMeter(unanswerable=False)
    meter.update(logits, torch.zeros(3, 2), rows)
    assert meter.compute(0.0) == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 / 3) / 2})
