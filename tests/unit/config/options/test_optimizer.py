"""Optimizer and schedule names and settings are those of transformers and torch."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from ftlevel.cli.spelling import build_flag_specs, resolve_flag_aliases
from ftlevel.config import TrainerConfig
from ftlevel.config.flags import FLAGS
from ftlevel.config.layers import Layer, build_config
from ftlevel.config.trainer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
from ftlevel.errors import ConfigError

_RUN_PARAMETERS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}


@pytest.mark.parametrize("name", get_args(Schedule))
def test_schedule_settings_match_transformers(name):
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    if name == "reduce_lr_on_plateau":
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau
    parameters = set(inspect.signature(schedule).parameters) - _RUN_PARAMETERS
    supported = set(SCHEDULES[name].names) if name in SCHEDULES else set()
    assert supported <= parameters
    assert parameters - supported <= {"mode", "warmup_lr_rate"}  # a loss is always minimized


@pytest.mark.parametrize("name", get_args(get_args(Optimizer)[0]))
def test_optimizer_trains_and_restores_state(name):
    values = {"momentum": 0.5, "beta3": 0.99, "lr_decay": 0.1}
    optimizer_settings = {
        k: v for k, v in values.items() if k in getattr(OPTIMIZERS.get(name), "names", ())
    }
    arguments = TrainingArguments(
        optim=name, learning_rate=1e-3, use_cpu=True, report_to="none",
        optim_args=",".join(f"{k}={v}" for k, v in optimizer_settings.items()) or None,
    )  # fmt: skip
    layer = torch.nn.Linear(64, 64)
    build, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    optimizer = build(layer.parameters(), **settings)
    for key, value in optimizer_settings.items():
        assert value in _flat(optimizer.defaults.values()), key

    def step() -> float:
        loss = layer(torch.ones(1, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer.load_state_dict(optimizer.state_dict())
    assert step() < first
    assert not torch.equal(state["weight"], layer.state_dict()["weight"])


def _flat(values: Any) -> list[Any]:
    return [part for v in values for part in (v if isinstance(v, tuple) else (v,))]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"optim": "galore_adamw"}, "projects gradients of full weights to a low rank"),
        ({"optim": "sgd", "optim_args": "mass=1"}, "--optim-args mass: no setting of --optim sgd."),
        ({"optim": "sgd", "optim_args": {"nesterov": 3}}, "nesterov=3: expected true, false."),
        ({"optim": "sgd", "adam_epsilon": 1e-6}, "--adam-epsilon 1e-06 has no effect with"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, "--adam-epsilon 1e-06 has no effect with"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles=x"},
         "num_cycles=x: expected a number"),
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "It has none. Drop it."),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps: "),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 3}, "has no warm-up"),
    ],
)  # fmt: skip
def test_invalid_settings_raise(train, message):
    with pytest.raises(ConfigError) as error:
        build_config([Layer({"train": train})])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["num_cycles=3,power=0.5,decay_type=1-sqrt,nesterov=true"],
        ['{"num_cycles": 3, "power": 0.5, "decay_type": "1-sqrt", "nesterov": true}'],
        ["num_cycles=3", "--optim-args", "power=0.5,decay_type=1-sqrt", "--optim_args",
         "nesterov=True"],
    ],
)  # fmt: skip
def test_optim_args_formats(arguments):
    row = next(flag for flag in FLAGS if flag.path == "train.optim_args")
    line = resolve_flag_aliases(["--optim-args", *arguments], build_flag_specs("train", [row])).args
    pairs = dict(pair.split("=") for pair in line if "=" in pair)
    settings = TrainerConfig(optim_args=pairs).optim_args
    assert settings == {"num_cycles": 3, "power": 0.5, "decay_type": "1-sqrt", "nesterov": True}
    assert settings["nesterov"] is True
