"""What the model says of the answers as it begins: the reference that preferences are held against.

It is the model at step 0, with whatever adapter it begins with, and nothing dropped: where a method
rewrites the base (PiSSA, OLoRA, LoftQ) the base without its adapter is another model, and where the
run goes on from an adapter that is what must not be left. It is computed once, by the packed rows
of the fast step, and kept under a digest of all that decides it; so no second model is ever loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.likelihoods import measure_likelihoods
from ftlevel.events import Listener
from ftlevel.fast.head.likelihoods import measure_answers
from ftlevel.fast.packing.layout import using_layout
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.models.hardware import autocast
from ftlevel.task import LikelihoodObjective
from ftlevel.trained.adapt import save_adapter
from ftlevel.training.arguments import build_evaluator
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.reference.kept import digest_start, read_or_fill
from ftlevel.workspace import Workspace

AT_ONCE = 64
"""Rows that are cut into micro-batches together."""


@dataclass(frozen=True)
class Reference:
    """What is known of the reference.

    Attributes:
        facts: what summary.json says of it.
        start: a temporary directory with the adapter as it began, or the name of another model;
            None where it began as nothing.
    """

    facts: Mapping[str, Any]
    start: Any = None


def fill_reference(
    config: TrainConfig, plan: Plan, adapted: Adapted, listener: Listener
) -> tuple[Plan, Reference | None]:
    """Return the plan with rows that know their reference, and what is known of that.

    Args:
        config: the whole configuration.
        plan: of the run.
        adapted: its model, as it begins, with the fast step on it.
        listener: told of it.
    """
    if not needs_reference(plan):
        return plan, None
    listener.stage("compute the reference")
    key, name = digest_start(config, plan, adapted), "the model as it begins"
    plan, facts = fill_rows(config, plan, name, key, lambda: (plan, adapted), listener)
    return plan, Reference(facts, _keep_start(config, plan, adapted))


def needs_reference(plan: Plan) -> bool:
    """Whether the rows of a run have to know a reference."""
    objective = plan.objective
    return isinstance(objective, LikelihoodObjective) and objective.needs_reference


def fill_rows(
    config: TrainConfig,
    plan: Plan,
    name: str,
    key: str,
    ask: Callable[[], tuple[Plan, Adapted]],
    listener: Listener,
) -> tuple[Plan, dict[str, Any]]:
    """Return `plan` with rows that know their reference, and what summary.json says of that.

    Args:
        config: the whole configuration.
        plan: of the run.
        name: of the reference, for the screen.
        key: all that decides what the reference says of a row.
        ask: gives the reference, and the plan by which it computes; not called where all is kept.
        listener: told of it.
    """
    task: Any = plan.task
    train, cached = read_or_fill(config, key, plan.data.train, lambda into: _fill(*ask(), into))
    data = replace(plan.data, train=task.with_reference(plan.data.train, train))
    if plan.data.validation:
        evaluator = build_evaluator(config, plan)
        if evaluator is None:
            raise TypeError("validation rows are evaluated")

        def score(into: np.ndarray) -> None:
            into[:] = measure_likelihoods(evaluator, ask()[1].model)

        padded = f"{key} padded by {evaluator.batch_size}"
        held_out, _ = read_or_fill(config, padded, plan.data.validation, score)
        data = replace(data, validation=task.with_reference(plan.data.validation, held_out))
    how = "computed before and kept" if cached else "computed before step 1"
    rows = len(plan.data.train) + len(plan.data.validation)
    listener.choices("reference", [Choice("reference", name, f"{how}, {rows:,} rows")])
    return replace(plan, data=data), {"is": name, "rows": rows, "cached": cached}


FIRST_LOSS = 1e-6
"""How far the first loss may be from what it has to be, relative, without a word about it."""


def describe_first_loss(
    reference: Reference, config: TrainConfig, plan: Plan, records: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Return what summary.json says of the reference, and why the first loss is another.

    Args:
        reference: of the run.
        config: the whole configuration.
        plan: of the run.
        records: what was logged.
    """
    expected, facts = plan.objective.first_loss, dict(reference.facts)
    first = next((r["loss"] for r in records if r["step"] == 1 and "loss" in r), None)
    if expected is None or first is None:
        return facts, []
    facts |= {"first_loss": first, "first_loss_expected": expected}
    if abs(first - expected) <= FIRST_LOSS * expected:
        return facts, []
    dropped = getattr(config.method, "lora_dropout", 0.0)
    why = (
        f"dropout of {dropped:g} is on in the policy and off in the reference"
        if dropped
        else f"in {plan.model.dtype} the same rows, packed otherwise, are rounded otherwise"
    )
    return facts, [f"the first loss is {first:.7f}, and {expected:.7f} at the reference: {why}."]


def _keep_start(config: TrainConfig, plan: Plan, adapted: Adapted) -> Any:
    """Return a temporary directory with the adapter as it begins; None where that is nothing.

    An adapter that takes its start out of the base is saved for the untouched base, and nothing
    there as well.
    """
    model = adapted.model
    rewrites = METHODS[config.method.kind].rewrites_base(config.method)
    if not hasattr(model, "peft_config") or (plan.adapter is None and rewrites):
        return None
    on, off = (_switched(plan, adapted, off=off) for off in (False, True))
    if plan.adapter is None and np.array_equal(on, off):
        return None
    kept = Workspace("start")
    save_adapter(model, config.method, Path(kept.name), adapted.start)
    return kept


def _switched(plan: Plan, adapted: Adapted, *, off: bool) -> np.ndarray:
    """Return what the model says of a row, with its adapter or without."""
    row, model = plan.data.train[0], adapted.model
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            autocast(plan.model.device, plan.model.dtype),
            model.disable_adapter() if off else contextlib.nullcontext(),
        ):
            return _measure(plan, adapted, [row])
    finally:
        model.train(training)


def _fill(plan: Plan, adapted: Adapted, into: np.ndarray) -> None:
    """Write what is missing of `into` (rows, 2; mutated), some rows at a time."""
    rows, model = plan.data.train, adapted.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(plan.model.device, plan.model.dtype):
            for begin in range(0, len(rows), AT_ONCE):
                part = slice(begin, begin + AT_ONCE)
                if not np.isnan(into[part]).any():
                    continue
                own = [rows[i] for i in range(*part.indices(len(rows)))]
                into[part] = _measure(plan, adapted, own)
                if isinstance(into, np.memmap):
                    into.flush()
    finally:
        model.train(training)


def _measure(plan: Plan, adapted: Adapted, rows: Sequence[Encoded]) -> np.ndarray:
    """Return (rows, 2): of a pair its two answers, else the answer and what it contrasts with."""
    found = np.full((len(rows), 2), np.nan, dtype=np.float32)
    contrasts = [other for row in rows for other in row.contrasts]
    for column, some in ((0, rows), (1, contrasts)):
        for chosen, answers in _score(plan, adapted, some):
            sums = answers[:, 0].float().cpu().numpy().reshape(len(chosen), -1)
            found[chosen, column : column + sums.shape[1]] = sums
    return found


def _score(
    plan: Plan, adapted: Adapted, rows: Sequence[Encoded]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield indices of rows and how likely their answers are, by the path of the training step."""
    objective, device = plan.objective, plan.model.device
    if not rows or not isinstance(objective, LikelihoodObjective):
        return
    head = adapted.fast.cross_entropy if adapted.fast is not None else None
    for chosen, batch in micro_batches(adapted.fast, rows, plan.model.pad_id):
        layout = batch.pop("layout", None)
        moved = {name: value.to(device) for name, value in batch.items()}
        with using_layout(layout.to(device) if layout is not None else None):
            yield chosen, measure_answers(head, adapted.model, objective, moved)


def micro_batches(
    fast: FastStep | None, rows: Sequence[Encoded], pad_id: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield indices of rows and their batch, as the training step would cut them."""
    if fast is not None:
        yield from StepCollator(pad_id, fast.plan).split(rows)
        return
    collate = Collator(pad_id)
    for index, row in enumerate(rows):
        yield [index], collate([row])
