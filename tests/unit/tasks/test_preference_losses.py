"""Losses of preferences by the fast and the plain step, against figures of plain torch and TRL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ftlevel.config.options.preference import LOSSES, SMOOTHING, PreferenceConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.fast.head.likelihoods import measure_answers, sum_of_ratios, with_baseline
from ftlevel.fast.packing.layout import using_layout
from ftlevel.fast.plan.fast_plan import FastPlan
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.task import TrainingLoss
from ftlevel.tasks.preferences.objective import Preferences, build_preferences
from ftlevel.tasks.preferences.rows import ContrastedRows, ReferencedRows
from preference_figures import (
    BASELINE,
    PAD,
    TABLE,
    build_model,
    judged_rows,
    norms,
    pair_rows,
)

PACKED = FastPlan(True, True, True, 4096, prefix_tree=True, prunes_last_layer=True)
PADDED = FastPlan(True, False, True, 4096)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model()


def _objective(name: str, beta: float) -> Preferences:
    told = {"loss": name, **TABLE[name][0]} if name in TABLE else {"loss": name}
    settings = PreferenceConfig(**told, beta=beta)
    smoothing = SMOOTHING if LOSSES[settings.loss or ""].smoothed else 0.0
    return build_preferences(settings, smoothing, "decoder")


def _measure(model: Any, objective: Preferences, rows: Any, plan: FastPlan | None) -> np.ndarray:
    """Return the sums (rows, answers) of `model` as it is now, without a gradient."""
    with torch.no_grad():
        batch = Collator(PAD)(rows)
        answers = measure_answers(None, model, objective, batch)
    return answers[:, 0].numpy().reshape(len(rows), -1)


def _rows(model: Any, objective: Preferences) -> Any:
    """Return the rows of the objective, with the reference that the model has without adapter."""
    rows: Any = pair_rows() if objective.is_paired else ContrastedRows(judged_rows(), 512)
    if not objective.needs_reference:
        return list(ReferencedRows(rows, None))
    with model.disable_adapter():
        own = _measure(model, objective, list(rows), None)
        contrasts = [other for row in rows for other in row.contrasts]
        if contrasts:
            own = np.hstack([own, _measure(model, objective, contrasts, None)])
    return list(ReferencedRows(rows, own.astype(np.float32)))


def _step(
    model: Any, objective: Any, rows: Any, plan: FastPlan | None, tokens: int = 4096
) -> tuple[float, float, float]:
    """Return loss and norms of a step over `rows`, by `plan` in micro-batches of `tokens`."""
    model.zero_grad()
    loss = TrainingLoss()
    if plan is None:
        parts: list[dict[str, Any]] = [Collator(PAD)(rows)]
        others = [Collator(PAD)([o for row in rows for o in row.contrasts])] if (
            rows[0].contrasts) else []  # fmt: skip
        head = fast = None
    else:
        fast = FastStep(model, replace(plan, tokens=tokens))
        fast.check(rows, PAD, "cpu", "float32")
        assert not fast.check_cross_entropy(objective, rows, PAD, "cpu", "float32")
        fast.prune_last_layer(objective, rows, PAD, "cpu", "float32")
        head = fast.cross_entropy
        step = StepCollator(PAD, fast.plan)(rows)
        parts, others = step["micro_batches"], step.get("contrasts", [])
    try:
        count = torch.stack([objective.training_count(p["labels"], loss) for p in parts]).sum(0)
        if others:
            total = sum_of_ratios(head, model, objective, others)
            assert float(total[0] / total[1]) == pytest.approx(BASELINE, abs=2e-5)
        found = 0.0
        for part in parts:
            own = dict(part)
            layout = own.pop("layout", None)
            if others:
                baseline = (total[0] / total[1]).clamp(min=0)
                own["verdicts"] = with_baseline(own["verdicts"], baseline)
            with using_layout(layout):
                answers = measure_answers(head, model, objective, own)
                share = (objective.judge(answers, own["verdicts"], training=True) / count).sum()
                share.backward()
            found += share.item()
    finally:
        if fast is not None:
            fast.remove()
    return found, *norms(model)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("at", [0, 1], ids=["beta 0.1", "beta 0.5"])
@pytest.mark.parametrize("plan", [None, PADDED, PACKED], ids=["plain", "padded", "packed"])
def test_loss_and_gradients_are_those_of_plain_torch_and_of_trl(
    model: Any, name: str, at: int, plan: FastPlan | None
) -> None:
    objective = _objective(name, (0.1, 0.5)[at])
    found = _step(model, objective, _rows(model, objective), plan)
    assert found == pytest.approx(TABLE[name][1 + at], rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", TABLE)
def test_a_step_is_the_same_however_it_is_cut(model: Any, name: str) -> None:
    objective = _objective(name, 0.1)
    rows = _rows(model, objective)
    whole = _step(model, objective, rows, PACKED)
    cut = _step(model, objective, rows[::-1] if objective.is_paired else rows, PACKED, tokens=1)
    assert cut == pytest.approx(whole, rel=1e-5, abs=1e-6)
