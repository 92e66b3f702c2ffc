"""How many steps a run makes, and how fast it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftlevel.config import DEFAULT_MODEL, TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.config.trainer import TrainerConfig
from ftlevel.methods import METHODS
from ftlevel.methods.rates import RunFacts, choose_head_rate
from ftlevel.training.plan.plan import Schedule


def steps_an_epoch(config: TrainerConfig, rows: int) -> int:
    """Return how many optimizer steps it takes to go through `rows` rows."""
    micro_steps = math.ceil(rows / config.per_device_train_batch_size / (config.num_processes or 1))
    return max(math.ceil(micro_steps / config.gradient_accumulation_steps), 1)


def count_steps(config: TrainerConfig, rows: int) -> int:
    """Return how many optimizer steps a run over `rows` rows makes."""
    return config.max_steps or math.ceil(config.num_train_epochs * steps_an_epoch(config, rows))


@dataclass(frozen=True)
class Rates:
    """The peak learning rates of a run.

    Attributes:
        base: of all that is trained but new heads.
        head: of new heads; None where there are none.
    """

    base: Choice
    head: Choice | None

    @property
    def choices(self) -> list[Choice]:
        """Lines for the screen: of the head only where it has a rate of its own."""
        apart = self.head is not None and self.head.value != self.base.value
        return [self.base, self.head] if apart and self.head else [self.base]

    def schedule(self, steps: int) -> Schedule:
        """Return how far and how fast a run of so many optimizer steps goes."""
        head = self.head.value if self.head else None
        return Schedule(steps=steps, learning_rate=self.base.value, head_learning_rate=head)


def choose_rates(config: TrainConfig, known: RunFacts) -> Rates:
    """Return the peak learning rates: the user's, or those of the method for such a run.

    A rate that the user gives is that of everything, unless the head's is given too.
    """
    method, given = METHODS[config.method.kind], config.train
    base = head = None
    if given.learning_rate is not None:
        base = Choice("learning rate", given.learning_rate)
    if given.head_learning_rate is not None:
        head = Choice("head learning rate", given.head_learning_rate)
    elif base is not None:
        head = Choice("head learning rate", base.value)
    rates = method.rates(config.method)
    base = base or rates.choose(config.method.kind, known)
    head = head or (base if rates.is_heads else choose_head_rate(known))
    return Rates(base, head if known.new_head else None)


def find_stand_in(config: TrainConfig) -> list[str]:
    """Return what is to be said where the user's own data meets a model that nobody chose."""
    is_own = not config.data.dataset.startswith("builtin:")
    if not is_own or "name_or_path" in config.model.model_fields_set:
        return []
    return [
        f"no model is named, so the built-in one of 2.6 M parameters ({DEFAULT_MODEL}) learns from "
        f"{config.data.dataset}. It is for trying things out. Name one of use: --model "
        "HuggingFaceTB/SmolLM2-135M-Instruct, for one."
    ]


def find_warnings(
    config: TrainerConfig, rows: int, validation_rows: int, *, new_head: bool = True
) -> list[str]:
    """Return what was asked for and will not come to pass in a run of this length and head."""
    steps, found = count_steps(config, rows), []
    if config.warmup_steps > max(steps, 1):
        reached = (steps - 1) / int(config.warmup_steps)
        found.append(
            f"--warmup-steps {config.warmup_steps:,g} is longer than the run of {steps:,} steps: "
            f"the learning rate ends at {reached:.0%} of its peak."
        )
    if config.head_learning_rate is not None and not new_head:
        found.append(
            "train.head_learning_rate: the model gets no new head, so nothing learns at this rate; "
            "--learning-rate is that of all that is trained."
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
