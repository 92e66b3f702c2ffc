"""Tests of schedule warnings, learning rates and their reasons."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import TrainConfig
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import ConfigError
from ftlevel.methods.rates import RateInputs
from ftlevel.training.plan.schedule import check_schedule, get_schedule_warnings, resolve_rates


@pytest.mark.parametrize(
    ("settings", "validation_rows", "expected"),
    [
        ({"warmup_steps": 3, "max_steps": 3}, 4, []),
        ({"warmup_steps": 0.5, "max_steps": 1}, 4, []),
        ({"eval_steps": 2}, 4, []),
        ({}, 0, []),
        ({"warmup_steps": 50, "max_steps": 5}, 4,
         ["--warmup-steps 50 is longer than the run of 5 steps: the learning rate ends at 8% of "
          "its peak."]),
        ({"eval_steps": 2}, 0,
         ["--eval-steps: there are no validation rows to evaluate. Add --validation-split 0.05."]),
        ({"eval_on_start": True}, 0,
         ["train.eval_on_start: there are no validation rows to evaluate. Add --validation-split "
          "0.05."]),
    ],
)  # fmt: skip
def test_ineffective_settings_are_warned(
    settings: dict[str, Any], validation_rows: int, expected: list[str]
) -> None:
    steps = settings.get("max_steps", 24)
    assert get_schedule_warnings(TrainerConfig(**settings), steps, validation_rows) == expected


def test_head_learning_rate_without_new_head_is_warned() -> None:
    config = TrainerConfig(head_learning_rate=0.1)
    assert get_schedule_warnings(config, 64, 4) == []
    (warning,) = get_schedule_warnings(config, 64, 4, new_head=False)
    assert warning.startswith("--head-learning-rate: the model has no new head. ")


def test_warned_share_of_peak_matches_scheduler() -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=50, num_training_steps=5)
    for _ in range(4):  # the fifth step uses the rate after the fourth
        optimizer.step()
        scheduler.step()
    (warning,) = get_schedule_warnings(TrainerConfig(warmup_steps=50), 5, 1)
    assert f"{scheduler.get_last_lr()[0]:.0%} of its peak" in warning


NEW_HEAD = RateInputs("encoder", 384, True, 100)


def resolve_rate_choices(
    inputs: RateInputs = NEW_HEAD, method: str = "lora", **train: Any
) -> list[tuple[str, Any]]:
    config = TrainConfig.model_validate({"method": {"kind": method}, "train": train})
    resolved = resolve_rates(config.method, config.train, inputs)
    schedule = resolved.schedule(inputs.steps, inputs.steps)
    assert schedule.learning_rate == resolved.base.value
    assert schedule.head_learning_rate == (resolved.head and resolved.head.value)
    return [(choice.name, choice.value) for choice in resolved.choices]


def test_new_head_has_separate_rate() -> None:
    assert resolve_rate_choices() == [("learning rate", 1e-3), ("head learning rate", 2e-2)]
    assert resolve_rate_choices(RateInputs("decoder", 384, False, 100)) == [("learning rate", 2e-3)]


def test_explicit_learning_rate_applies_to_all_parameters() -> None:
    assert resolve_rate_choices(learning_rate=0.123) == [("learning rate", 0.123)]
    both = resolve_rate_choices(learning_rate=0.123, head_learning_rate=0.4)
    assert both == [("learning rate", 0.123), ("head learning rate", 0.4)]
    assert resolve_rate_choices(head_learning_rate=0.4) == [
        ("learning rate", 1e-3),
        ("head learning rate", 0.4),
    ]


def test_frozen_base_has_one_rate() -> None:
    config = TrainConfig.model_validate({"method": {"kind": "full", "freeze_base": True}})
    (choice,) = resolve_rates(config.method, config.train, NEW_HEAD).choices
    assert str(choice) == (
        "0.1 (default for full on an encoder of hidden size 384 with a new head and 100 steps; "
        "measured)"
    )


def test_reasons_of_default_rates() -> None:
    config = TrainConfig.model_validate({"method": {"kind": "lora"}})
    base, head = resolve_rates(config.method, config.train, NEW_HEAD).choices
    assert str(base) == (
        "0.001 (default for lora on an encoder of hidden size 384 with a new head and 100 steps; "
        "measured)"
    )
    assert str(head) == (
        "0.02 (default for a linear head on an encoder of hidden size 384 with a new head and 100 "
        "steps; measured)"
    )


@pytest.mark.parametrize(
    ("train", "rows", "message"),
    [
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "lr_end=0.1"}, 0,
         "lr_end=0.1: it must be below the learning rate 0.01. Use less than 0.01"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 0, "needs validation rows"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, 5,
         "needs validation rows"),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.5,
          "lr_scheduler_kwargs": "num_decay_steps=51"}, 0, "are warm-up. Use at most 50."),
    ],
)  # fmt: skip
def test_invalid_scheduler_settings_raise(train: Any, rows: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_schedule(TrainerConfig(**train), 0.01, 100, rows)
    assert message in str(caught.value)


def test_default_rate_with_lion_is_warned() -> None:
    (warning,) = get_schedule_warnings(TrainerConfig(optim="paged_lion_8bit"), 10, 0)
    assert "measured with AdamW, and Lion needs a third to a tenth" in warning
    assert not get_schedule_warnings(
        TrainerConfig(optim="paged_lion_8bit", learning_rate=0.1), 10, 0
    )
    assert not get_schedule_warnings(TrainerConfig(optim="paged_adamw_8bit"), 10, 0)
