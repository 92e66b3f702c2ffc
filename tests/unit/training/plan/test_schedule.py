"""What a run is told of its length before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config.sections import TrainerConfig
from ftlevel.training.plan.schedule import find_warnings


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
         ["--eval-steps: there are no validation rows, so nothing is evaluated; --validation-split "
          "0.05 holds some back."]),
        ({"eval_on_start": True}, 0,
         ["train.eval_on_start: there are no validation rows, so nothing is evaluated; "
          "--validation-split 0.05 holds some back."]),
    ],
)  # fmt: skip
def test_what_will_not_come_to_pass_is_said(
    settings: dict[str, Any], validation_rows: int, expected: list[str]
) -> None:
    assert find_warnings(TrainerConfig(**settings), 64, validation_rows) == expected


def test_the_share_of_the_peak_is_the_schedules_own() -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=50, num_training_steps=5)
    for _ in range(4):  # the fifth step is made with the rate after the fourth
        optimizer.step()
        schedule.step()
    (warning,) = find_warnings(TrainerConfig(warmup_steps=50, max_steps=5), 64, 1)
    assert f"{schedule.get_last_lr()[0]:.0%} of its peak" in warning
