"""How many steps a run makes, and how fast it learns."""

from __future__ import annotations

import math

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.config.sections import TrainerConfig
from ftlevel.methods import METHODS
from ftlevel.models.sources import ModelSource


def count_steps(config: TrainerConfig, rows: int) -> int:
    """Return how many optimizer steps a run over `rows` rows makes."""
    micro_steps = math.ceil(rows / config.per_device_train_batch_size / (config.num_processes or 1))
    an_epoch = max(math.ceil(micro_steps / config.gradient_accumulation_steps), 1)
    return config.max_steps or math.ceil(config.num_train_epochs * an_epoch)


def choose_learning_rate(config: TrainConfig, source: ModelSource) -> Choice:
    """Return the peak learning rate: the user's, or the method's default.

    The papers' rates are for models a hundred times the size of the built-in one, which learns
    next to nothing at them in a short run; it gets ten times as much where that is below 0.01.
    """
    kind = config.method.kind
    if config.train.learning_rate is not None:
        return Choice("learning rate", config.train.learning_rate)
    rate, reason = METHODS[kind].learning_rate(config.method), f"default for {kind}"
    if source.kind == "builtin" and rate * 10 <= 1e-2:
        return Choice("learning rate", rate * 10, f"{reason}, times 10 for a model this small")
    return Choice("learning rate", rate, reason)


def find_warnings(config: TrainerConfig, rows: int, validation_rows: int) -> list[str]:
    """Return what was asked for and will not come to pass in a run of this length."""
    steps, found = count_steps(config, rows), []
    if config.warmup_steps > max(steps, 1):
        reached = (steps - 1) / int(config.warmup_steps)
        found.append(
            f"--warmup-steps {config.warmup_steps:,g} is longer than the run of {steps:,} steps: "
            f"the learning rate ends at {reached:.0%} of its peak."
        )
    asked = {
        "--eval-steps": config.eval_steps,
        "--eval-strategy": config.eval_strategy in ("steps", "epoch"),
        "train.eval_on_start": config.eval_on_start,
    }
    if not validation_rows and any(asked.values()):
        name = next(name for name, value in asked.items() if value)
        found.append(
            f"{name}: there are no validation rows, so nothing is evaluated; "
            "--validation-split 0.05 holds some back."
        )
    return found
