"""Tests that a run stops at the step where a loss, gradient or weight is not finite."""

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


def create_recovery() -> Recovery:
    """Return the recovery of a run that stops on the first error."""
    trainer: Any = SimpleNamespace(step_rows=[])
    run = RunDirectory(Path("nothing"))
    return Recovery(trainer, TrainerConfig(), run, Processes(), NullListener(), None)


def create_monitor_and_model(
    loss: float = 1.0,
) -> tuple[GradientMonitor, nn.Linear, dict[str, Any]]:
    """Return a monitor, and a model with finite gradients, with the callback's arguments."""
    monitor, model = (
        GradientMonitor(NullListener(), lambda: torch.tensor(loss), create_recovery()),
        nn.Linear(4, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    return monitor, model, {"model": model, "optimizer": optimizer}


STATE: Any = SimpleNamespace(global_step=6)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_loss_with_finite_gradients_raises(loss: float) -> None:
    monitor, _, arguments = create_monitor_and_model(loss)
    with pytest.raises(RunError, match=f"the loss is {loss} at step 7"):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)


def test_nonfinite_gradient_raises_with_name() -> None:
    monitor, model, arguments = create_monitor_and_model()
    for _ in range(3):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    assert model.weight.grad is not None
    model.weight.grad[1, 2] = math.inf
    with pytest.raises(RunError, match=r"not finite at step 7 \(1 of 2 tensors, such as weight"):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)


def test_nonfinite_weight_after_optimizer_step_raises() -> None:
    monitor, model, arguments = create_monitor_and_model()
    monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    monitor.on_optimizer_step(NONE, STATE, NONE)
    with torch.no_grad():
        model.bias[2] = math.nan
    with pytest.raises(RunError, match=r"1 of 2 trained tensors are not finite after step 7"):
        monitor.on_optimizer_step(NONE, STATE, NONE)


def test_finite_weights_with_overflowing_norm_are_accepted() -> None:
    monitor, model, arguments = create_monitor_and_model()
    monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    with torch.no_grad():
        model.weight.fill_(1e30)
    assert not torch.isfinite(model.weight.norm())
    monitor.on_optimizer_step(NONE, STATE, NONE)


def train_with_grad_scaler(
    loss_factor: float, steps: int
) -> tuple[GradientMonitor, list[str], list[torch.Tensor]]:
    """Train a linear layer as Trainer does with float16, from the largest loss scale.

    Returns:
        The monitor, its warnings, and the weights after each step.
    """
    warnings: list[str] = []
    listener = SimpleNamespace(warn=warnings.append)
    monitor = GradientMonitor(
        listener, lambda: torch.tensor(1.0), create_recovery(), uses_scaler=True
    )  # type: ignore[arg-type]
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weights = []
    for index in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_factor * model(torch.ones(2, 4)).square().mean()).backward()
        scaler.unscale_(optimizer)
        state: Any = SimpleNamespace(global_step=index)
        monitor.on_pre_optimizer_step(NONE, state, NONE, model=model, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
        monitor.on_optimizer_step(NONE, state, NONE)
        weights.append(model.weight.detach().clone())
    return monitor, warnings, weights


def test_skipped_float16_steps_are_counted_and_warned() -> None:
    monitor, warnings, weights = train_with_grad_scaler(64.0, 12)
    assert 0 < monitor.skipped < 11
    assert len(warnings) == 1
    assert "float16 overflowed at step 1, which is skipped" in warnings[0]
    assert torch.equal(weights[0], weights[monitor.skipped - 1]), "skipped steps change nothing"
    assert not torch.equal(weights[-1], weights[0])
    assert monitor.checked == 2


def test_repeated_float16_overflow_raises() -> None:
    with pytest.raises(RunError, match=f"the last {MAX_SKIPPED} steps up to step {MAX_SKIPPED}"):
        train_with_grad_scaler(2.0**60, 30)


CONTROL: Any = SimpleNamespace(
    should_log=False, should_evaluate=False, should_save=False, should_training_stop=False
)


@pytest.mark.parametrize("kind", ["loss", "gradient", "weights"])
def test_delayed_check_raises_before_saving(kind: str) -> None:
    losses = [1.0]
    _, model, arguments = create_monitor_and_model()
    monitor = GradientMonitor(
        NullListener(), lambda: torch.tensor(losses[0]), create_recovery(), delays_checks=True
    )
    for _ in range(3):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    if kind == "loss":
        losses[0] = math.nan
    with torch.no_grad():
        (model.weight if kind == "weights" else model.weight.grad)[0] += {  # type: ignore[index]
            "loss": 0.0}.get(kind, math.inf)  # fmt: skip
    monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    monitor.on_optimizer_step(NONE, STATE, NONE)
    next_state: Any = SimpleNamespace(global_step=7)
    monitor.on_step_end(NONE, next_state, CONTROL)
    with pytest.raises(RunError, match=rf"the {kind} (is|are) not finite at step 7"):
        monitor.on_step_end(
            NONE, next_state, SimpleNamespace(**vars(CONTROL) | {"should_save": True})
        )


@pytest.mark.parametrize("size", [1, 4])
def test_unused_bias_of_a_single_score_is_not_warned_about(size: int) -> None:
    warnings: list[str] = []
    listener: Any = SimpleNamespace(warn=warnings.append)
    monitor = GradientMonitor(listener, lambda: torch.tensor(1.0), create_recovery())
    model = nn.Linear(4, size)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # a loss of differences of scores, as in a ranking
        (model(torch.ones(2, 4)) - model(torch.zeros(2, 4))).square().sum().backward()
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, model=model, optimizer=optimizer)
    message = (
        "1 of 2 trainable tensors had only zero gradients so far: bias. They were not trained."
    )
    assert warnings == [message] * (size > 1)
    assert (monitor.checked, monitor.idle) == (2, ["bias"])
