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
from ftlevel.events import NullListener
from ftlevel.training.gradients import MAX_SKIPPED, GradientMonitor, Recovery
from ftlevel.training.processes import Processes

NONE: Any = None


def stopping() -> Recovery:
    """Return what decides in a run that stops."""
    trainer: Any = SimpleNamespace(step_rows=[])
    run = RunDirectory(Path("nothing"))
    return Recovery(trainer, TrainerConfig(), run, Processes(), NullListener(), None)


def prepared(loss: float = 1.0) -> tuple[GradientMonitor, nn.Linear, dict[str, Any]]:
    """Return the proof, and a model with finite gradients that it has seen for two steps."""
    proof, model = (
        GradientMonitor(NullListener(), lambda: torch.tensor(loss), stopping()),
        nn.Linear(4, 4),
    )
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
    assert not torch.isfinite(model.weight.norm())
    proof.on_optimizer_step(NONE, STATE, NONE)


def fit_with_a_scale(
    factor: float, steps: int
) -> tuple[GradientMonitor, list[str], list[torch.Tensor]]:
    """Train a linear as Trainer does with float16, from the largest scale on.

    Args:
        factor: of the loss.
        steps: how many.

    Returns:
        The proof, what it warned of, and the weights after each step.
    """
    warned: list[str] = []
    listener = SimpleNamespace(warn=warned.append)
    proof = GradientMonitor(listener, lambda: torch.tensor(1.0), stopping(), uses_scaler=True)  # type: ignore[arg-type]
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weights = []
    for number in range(steps):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(2, 4)).square().mean()).backward()
        scaler.unscale_(optimizer)
        state: Any = SimpleNamespace(global_step=number)
        proof.on_pre_optimizer_step(NONE, state, NONE, model=model, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
        proof.on_optimizer_step(NONE, state, NONE)
        weights.append(model.weight.detach().clone())
    return proof, warned, weights


def test_a_step_that_float16_skips_is_counted_and_shown() -> None:
    proof, warned, weights = fit_with_a_scale(64.0, 12)
    assert 0 < proof.skipped < 11
    assert len(warned) == 1
    assert "float16 overflowed at step 1, which is skipped" in warned[0]
    assert torch.equal(weights[0], weights[proof.skipped - 1]), "skipped steps change nothing"
    assert not torch.equal(weights[-1], weights[0])
    assert proof.checked == 2


def test_float16_that_overflows_without_end_stops() -> None:
    with pytest.raises(RunError, match=f"the last {MAX_SKIPPED} steps up to step {MAX_SKIPPED}"):
        fit_with_a_scale(2.0**60, 30)


CONTROL: Any = SimpleNamespace(
    should_log=False, should_evaluate=False, should_save=False, should_training_stop=False
)


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_gpu_is_asked_before_anything_is_written(what: str) -> None:
    losses = [1.0]
    _, model, given = prepared()
    proof = GradientMonitor(
        NullListener(), lambda: torch.tensor(losses[0]), stopping(), delays_checks=True
    )
    for _ in range(3):
        proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)
    if what == "loss":
        losses[0] = math.nan
    with torch.no_grad():
        (model.weight if what == "weights" else model.weight.grad)[0] += {  # type: ignore[index]
            "loss": 0.0}.get(what, math.inf)  # fmt: skip
    proof.on_pre_optimizer_step(NONE, STATE, NONE, **given)
    proof.on_optimizer_step(NONE, STATE, NONE)
    after: Any = SimpleNamespace(global_step=7)
    proof.on_step_end(NONE, after, CONTROL)
    with pytest.raises(RunError, match=rf"the {what} (is|are) not finite at step 7"):
        proof.on_step_end(NONE, after, SimpleNamespace(**vars(CONTROL) | {"should_save": True}))
