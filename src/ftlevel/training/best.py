"""The best evaluation of a run so far: which it is, and the weights that it was made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.training.plan.best_model import BestModel
from ftlevel.weights.tensor_files import Part, read_header, spec_of, write_file

_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Evaluated:
    """A step, and the values of the metric and of the loss there."""

    step: int
    value: float
    loss: float = math.nan


class Evaluations:
    """The evaluations of a run, one after another.

    Attributes:
        best: the best so far; None before the first that is a number.
        last: the last.
        count: how many there were.
        waited: how many there were since one was better by more than the threshold.
    """

    def __init__(self, plan: BestModel) -> None:
        self.plan = plan
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None
        self.count = 0
        self.waited = 0

    def add(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Add an evaluation and return whether it is the best so far.

        Of equal ones it is that with the lower loss: a few rows tell accuracies apart coarsely.
        A metric that is missing, as a correlation with a constant is, is no number.
        """
        value = float(scores.get(self.plan.metric, math.nan))
        loss = float(scores.get("eval_loss", math.nan))
        before, self.last = self.best, Evaluated(step, value, loss)
        self.count += 1
        far = before is None or self.plan.is_better(value, before.value, self.plan.threshold)
        self.waited = 0 if far else self.waited + 1
        is_best = not math.isnan(value) and (
            before is None
            or self.plan.is_better(value, before.value)
            or (value == before.value and loss < before.loss)
        )
        if is_best:
            self.best = self.last
        return is_best

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the evaluations among `records` of a log; that of the untrained model is none."""
        for record in records:
            if record["step"] > 0 and "eval_loss" in record:
                self.add(record["step"], record)

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better one."""
        return self.plan.patience is not None and self.waited >= self.plan.patience


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which model a run ends with.

    Attributes:
        metric: by which the evaluations were compared, with `eval_`.
        greater_is_better: whether the highest is the best.
        evaluations: how many there were.
        best: the best of them.
        last: the last.
        step: of the model that is kept.
        stopped_early: whether the run ended because none was better for long.
        patience: for how many.
        waited: evaluations since the last one that was better by more than the threshold.
    """

    metric: str
    greater_is_better: bool
    evaluations: int
    best: Evaluated
    last: Evaluated
    step: int
    stopped_early: bool
    patience: int | None
    waited: int

    def describe(self) -> dict[str, Any]:
        """Return what summary.json says of it."""
        return {
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
            "evaluations": self.evaluations,
            "kept_step": self.step,
            "best_step": self.best.step,
            "best": self.best.value,
            "last_step": self.last.step,
            "last": self.last.value,
            "stopped_early": self.stopped_early,
            "patience": self.patience,
            "waited": self.waited,
        }


def write_trained(model: Any, directory: Path) -> None:
    """Write the trained tensors of `model`, one at a time, so that none is held twice."""
    parts = [
        Part({name: spec_of(tensor)}, functools.partial(dict, {name: tensor}))
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]
    write_file(directory / _WEIGHTS, parts)


def read_trained(model: Any, directory: Path) -> None:
    """Put the tensors that `write_trained` wrote into `model` (mutated), one at a time.

    Bit for bit: no adapter is rebuilt. `Trainer._load_best_model` would have PEFT load a
    checkpoint, which fails for prompts, prunes AdaLoRA by ranks that its config does not have yet,
    and does not know the heads that ours hold in float32.
    """
    stored, _ = read_header(directory / _WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != trained.keys():
        odd = sorted(stored.keys() ^ trained.keys())[0]
        raise ValueError(f"{directory} holds other tensors than are trained, such as {odd}")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(stored[name].read())
