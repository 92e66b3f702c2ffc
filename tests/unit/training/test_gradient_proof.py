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


def create_monitor(losses: list[float] | None = None, **options: Any) -> tuple[Any, list[str]]:
    """Return a monitor whose run stops on the first error, and its warnings."""
    losses, warnings = losses or [1.0], []
    trainer, listener = SimpleNamespace(step_rows=[]), SimpleNamespace(warn=warnings.append)
    run = RunDirectory(Path("nothing"))
    recovery = Recovery(trainer, TrainerConfig(), run, Processes(), NullListener(), None)
    loss = lambda: torch.tensor(losses[0])  # noqa: E731
    return GradientMonitor(listener, loss, recovery, **options), warnings


def create_model() -> tuple[nn.Linear, dict[str, Any]]:
    """Return a model with finite gradients, and the callback's arguments."""
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).square().sum().backward()
    return model, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


STATE: Any = SimpleNamespace(global_step=6)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_loss_with_finite_gradients_raises(loss):
    monitor, _ = create_monitor([loss])
    with pytest.raises(RunError, match=f"the loss is {loss} at step 7"):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **create_model()[1])


def test_nonfinite_gradient_raises_with_name():
    (monitor, _), (model, arguments) = create_monitor(), create_model()
    for _ in range(3):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    model.weight.grad[1, 2] = math.inf
    with pytest.raises(RunError, match=r"not finite at step 7 \(1 of 2 tensors, such as weight"):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)


def test_nonfinite_weight_after_optimizer_step_raises():
    (monitor, _), (model, arguments) = create_monitor(), create_model()
    monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    with torch.no_grad():
        model.weight.fill_(1e30)
        assert not torch.isfinite(model.weight.norm())
        monitor.on_optimizer_step(NONE, STATE, NONE)  # an overflowing norm of finite weights
        model.bias[2] = math.nan
    with pytest.raises(RunError, match=r"1 of 2 trained tensors are not finite after step 7"):
        monitor.on_optimizer_step(NONE, STATE, NONE)


def train_with_grad_scaler(loss_factor: float, steps: int) -> tuple[Any, list[str], list[Any]]:
    """Train a linear layer as Trainer does with float16, from the largest loss scale.

    Returns:
        The monitor, its warnings, and the weights after each step.
    """
    monitor, warnings = create_monitor(uses_scaler=True)
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


def test_skipped_float16_steps_are_counted_and_warned():
    monitor, warnings, weights = train_with_grad_scaler(64.0, 12)
    assert 0 < monitor.skipped < 11
    assert len(warnings) == 1
    assert "float16 overflowed at step 1, which is skipped" in warnings[0]
    assert torch.equal(weights[0], weights[monitor.skipped - 1]), "skipped steps change nothing"
    assert not torch.equal(weights[-1], weights[0])
    assert monitor.checked == 2


def test_repeated_float16_overflow_raises():
    with pytest.raises(RunError, match=f"the last {MAX_SKIPPED} steps up to step {MAX_SKIPPED}"):
        train_with_grad_scaler(2.0**60, 30)


CONTROL = dict.fromkeys(
    ("should_log", "should_evaluate", "should_save", "should_training_stop"), False
)


@pytest.mark.parametrize("kind", ["loss", "gradient", "weights"])
def test_delayed_check_raises_before_saving(kind):
    losses, (model, arguments) = [1.0], create_model()
    monitor, _ = create_monitor(losses, delays_checks=True)
    for _ in range(3):
        monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    if kind == "loss":
        losses[0] = math.nan
    else:
        tensor = model.weight.grad if kind == "gradient" else model.weight.data
        tensor[0] += math.inf
    monitor.on_pre_optimizer_step(NONE, STATE, NONE, **arguments)
    monitor.on_optimizer_step(NONE, STATE, NONE)
    next_state: Any = SimpleNamespace(global_step=7)
    monitor.on_step_end(NONE, next_state, SimpleNamespace(**CONTROL))
    with pytest.raises(RunError, match=rf"the {kind} (is|are) not finite at step 7"):
        monitor.on_step_end(NONE, next_state, SimpleNamespace(**CONTROL | {"should_save": True}))


@pytest.mark.parametrize("size", [1, 4])
def test_unused_bias_of_a_single_score_is_not_warned_about(size):
    monitor, warnings = create_monitor()
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
