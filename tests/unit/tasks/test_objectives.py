"""Tests that losses match transformers' on batches without padding and are sums over targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tiny_models
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.detect import fits
from ftlevel.errors import InputError
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.tasks import TASKS
from ftlevel.tasks.span import Spans

CELLS = [
    ("text-generation", "decoder", "llama", "causal", {}),
    ("summarization", "encoder-decoder", "t5", "seq2seq", {}),
    ("masked-lm", "encoder", "bert", "mlm", {}),
    ("token-classification", "encoder", "bert", "tokcls", {}),
    ("token-classification", "decoder", "gpt2", "tokcls", {}),
    ("text-classification", "encoder", "bert", "seqcls", {}),
    ("question-answering", "encoder", "bert", "qa", {}),
    ("question-answering", "encoder-decoder", "bart", "qa", {}),
]


def full_batch(family: str, head: str) -> dict[str, torch.Tensor]:
    batch = tiny_models.build_batch(family, head, batch=3, length=10)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if head == "qa":
        spans = (batch.pop("start_positions"), batch.pop("end_positions"))
        batch["labels"] = torch.stack(spans, dim=1)
    elif head in ("causal", "mlm", "tokcls"):
        batch["labels"][0, 2:5] = -100
    return batch


def mean_loss(objective: Objective, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs, labels = objective.split(batch)
    logits = objective.logits(model(**inputs))
    total = objective.loss_sum(logits, labels, batch["attention_mask"])
    return total / objective.count(labels)


@pytest.mark.parametrize(("task", "kind", "family", "head", "config"), CELLS)
def test_mean_loss_matches_model_loss(task, kind, family, head, config):
    model = tiny_models.build(family, head, **config)
    batch = full_batch(family, head)
    objective = TASKS[task].create_objective(kind, {})
    inputs = dict(batch)
    if head == "qa":
        inputs["start_positions"], inputs["end_positions"] = inputs.pop("labels").unbind(1)
    with torch.no_grad():
        expected = model(**inputs).loss
        assert mean_loss(objective, model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
        ("regression", 1, torch.tensor([0.5, -100.0, 3.0])),
    ],
)
def test_loss_of_multi_label_and_regression_matches_model(problem, classes, labels):
    model = tiny_models.build("bert", "seqcls", problem_type=problem, num_labels=classes)
    batch = {**full_batch("bert", "seqcls"), "labels": labels}
    objective = TASKS["text-classification"].create_objective("encoder", {"problem_type": problem})
    with torch.no_grad():
        expected = model(**batch).loss
        assert mean_loss(objective, model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(objective.count(labels)) == labels.numel()


def test_span_loss_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 6, 2, generator=generator), torch.tensor([[1, 3]])
    spans = Spans("f1")
    short = spans.loss_sum(logits[:, :4], labels, torch.ones(1, 4))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert spans.loss_sum(logits, labels, mask).item() == pytest.approx(short.item(), rel=1e-6)
    assert int(spans.count(labels)) == 2


SMOOTHED_CELLS = [cell for cell in CELLS if cell[0] not in ("question-answering",)]


@pytest.mark.parametrize(("task", "kind", "family", "head", "config"), SMOOTHED_CELLS)
def test_label_smoothing_matches_transformers(task, kind, family, head, config):
    from transformers.trainer_pt_utils import LabelSmoother

    model = tiny_models.build(family, head, **config)
    batch = full_batch(family, head)
    objective = TASKS[task].create_objective(kind, {})
    assert objective.one_of_many
    inputs, labels = objective.split(batch)
    with torch.no_grad():
        outputs, mask = model(**inputs), batch["attention_mask"]
        logits = objective.logits(outputs)
        actual = objective.training_sum(logits, labels, mask, TrainingLoss(0.1))
        expected = LabelSmoother(0.1)({"logits": logits}, labels, shift_labels=head == "causal")
        plain = objective.training_sum(logits, labels, mask, TrainingLoss())
    assert (actual / objective.count(labels)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert actual != plain


def test_span_and_regression_have_no_label_smoothing():
    span = TASKS["question-answering"].create_objective("encoder", {})
    regression = TASKS["text-classification"].create_objective(
        "encoder", {"problem_type": "regression"}
    )
    assert not span.one_of_many
    assert not regression.one_of_many


def _row(labels: Any, length: int = 4) -> Encoded:
    return Encoded(input_ids=[5] * length, labels=labels, row=0)


@pytest.mark.parametrize(
    ("task", "properties", "rows", "expected"),
    [
        ("text-classification", {}, [_row(0), _row(1)], math.log(2)),
        ("text-classification", {}, [_row(0)] * 3 + [_row(2)],
         0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("text-classification", {"problem_type": "multi_label_classification"},
         [_row((1.0, 0.0)), _row((0.0, 0.0))], math.log(2) / 2),
        ("text-classification", {"problem_type": "regression"}, [_row(1.0), _row(3.0)], 1.0),
        ("token-classification", {}, [_row([-100, 0, 0, -100]), _row([-100, 0, 3, -100])],
         0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("question-answering", {}, [_row((0, 1), 10), _row((2, 2), 20)],
         (math.log(10) + math.log(20)) / 2),
        ("text-generation", {}, [_row([-100, 4, 5])], None),
    ],
)  # fmt: skip
def test_guess_loss_of_each_task(task, properties, rows, expected):
    kind = "decoder" if task == "text-generation" else "encoder"
    objective = TASKS[task].create_objective(kind, properties)
    actual = objective.guess_loss(rows)
    assert actual == (expected and pytest.approx(expected))


def test_guess_loss_equals_loss_of_label_frequencies():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    objective = TASKS["text-classification"].create_objective("encoder", {})
    logits = (labels.bincount() / len(labels)).log().expand(len(labels), 3)
    loss = objective.loss_sum(logits, labels, torch.ones(6, 1)) / objective.count(labels)
    assert objective.guess_loss([_row(int(label)) for label in labels]) == pytest.approx(
        loss.item()
    )


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_tasks_without_text_refuse_generate(task):
    with pytest.raises(InputError, match="Use ftlevel predict"):
        TASKS[task].create_query("a prompt", None, 0)


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.predicts_training_rows])
def test_predict_accepts_layouts_of_training_rows(task):
    """The command that a run prints at its end predicts the first rows of the training file."""
    for shape in task.shapes:
        if not shape.inner:
            names = [names[0] for names in shape.required.values()]
            assert fits(names, task.query_shapes), shape.name
