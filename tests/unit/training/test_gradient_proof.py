"""A run stops in the step in which something is not finite any more."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import RunError
from ftlevel.events import Silence
from ftlevel.training.callbacks.gradient_proof import GradientProof
from ftlevel.training.callbacks.recovery import Recovery
from ftlevel.training.processes import Processes

NONE: Any = None


def prepared(loss: float = 1.0) -> tuple[GradientProof, nn.Linear, dict[str, Any]]:
    """Return the proof, and a model with finite gradients that it has seen for two steps."""
    trainer: Any = SimpleNamespace(step_rows=[])
    run = RunDirectory(Path("nothing"))
    recovery = Recovery(trainer, TrainerConfig(), run, Processes(), Silence(), None)
    proof, model = GradientProof(Silence(), lambda: torch.tensor(loss), recovery), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    return proof, model, {"model": model, "optimizer": optimizer}


STATE: Any = SimpleNamespace(global_step=6)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_though_gradients_are(loss: float) -> None:
    proof, _, given = prepared(loss)
    with pytest.raises(RunError, match=f"the loss is {loss} at step 7"):
        proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    proof, model, given = prepared()
    for _ in range(3):
        proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)
    assert model.weight.grad is not None
    model.weight.grad[1, 2] = math.inf
    with pytest.raises(RunError, match=r"not finite at step 7 \(1 of 2 tensors, such as weight"):
        proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)


def test_a_weight_that_the_optimizer_spoiled_is_not_saved() -> None:
    proof, model, given = prepared()
    proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)
    proof.on_optimizer_step(NONE, STATE, NONE)
    with torch.no_grad():
        model.bias[2] = math.nan
    with pytest.raises(RunError, match=r"1 of 2 trained tensors are not finite after step 7"):
        proof.on_optimizer_step(NONE, STATE, NONE)


def test_weights_whose_norm_alone_overflows_go_on() -> None:
    proof, model, given = prepared()
    proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)
    with torch.no_grad():
        model.weight.fill_(1e30)
    proof.on_optimizer_step(NONE, STATE, NONE)
