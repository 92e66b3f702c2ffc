"""What a run will do, as facts: a few groups of what travels together.

What the screen says of a plan: each value that was chosen, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config import DEFAULT_MODEL, MethodConfig, QuantConfig, TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.prepare.encoder import Prepared
from ftlevel.fast.plan import FastPlan
from ftlevel.methods import METHODS, Base
from ftlevel.models.sources import ModelSource
from ftlevel.task import Objective, TrainingLoss
from ftlevel.tasks import BaseTask
from ftlevel.trained.another import Another
from ftlevel.training.plan.adapter import StartingAdapter
from ftlevel.training.plan.best_model import BestModel
from ftlevel.training.plan.method import MethodTargets


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """The base, before its weights are loaded.

    Attributes:
        source: where it is.
        kind: encoder, decoder or encoder-decoder.
        auto_class: transformers' class for the task.
        config: its config, with labels and padding for the task.
        tokenizer: its tokenizer, with a padding token.
        device: torch device type.
        dtype: compute precision's name.
        quant: how it is quantized, by the user's wish or in its checkpoint.
        heads: modules trained in full.
        new_modules: where weights may be that the checkpoint lacks.
        new_heads: those of `heads` that the checkpoint lacks, so that they begin at random.
        total_parameters: how many it has.
    """

    source: ModelSource
    kind: str
    auto_class: str
    config: Any
    tokenizer: Any
    device: str
    dtype: str
    quant: QuantConfig
    heads: list[str]
    new_modules: list[str]
    new_heads: list[str]
    total_parameters: int

    @property
    def family(self) -> str:
        """What transformers calls its architecture."""
        return str(self.config.model_type)

    @property
    def pad_id(self) -> int:
        """The token that fills a batch."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocabulary(self) -> int:
        """How many tokens its language head scores."""
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How far and how fast.

    Attributes:
        steps: optimizer steps.
        learning_rate: the peak: the user's or the method's.
        default_learning_rate: the method's, for such a run.
        head_learning_rate: that of new heads; None where there are none.
    """

    steps: int
    learning_rate: float
    default_learning_rate: float
    head_learning_rate: float | None


@dataclass(frozen=True)
class Beside:
    """The models that a run asks before its first step, and does not train.

    Attributes:
        reference: which preferences are held against; None where it is not another model.
        teacher: whose predictions are learned; None where there is none.
    """

    reference: Another | None = None
    teacher: Another | None = None

    def fingerprints(self) -> Mapping[tuple[str, str], str]:
        """Return section and field of each model → its fingerprint."""
        found = {("preference", "reference"): self.reference,
                 ("distillation", "teacher"): self.teacher}  # fmt: skip
        return {field: model.fingerprint for field, model in found.items() if model is not None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, before its weights are loaded.

    Attributes:
        task: the task.
        objective: what the model is trained on.
        loss: what the loss of training has beside that of evaluation.
        model: the base.
        data: encoded rows.
        targets: what the method adapts.
        schedule: steps and rate.
        fast: the parts of the fast step that are used.
        best: how the best evaluation is told; None where nobody asks.
        adapter: what the run goes on from; None where the adapter is new.
        choices: lines for the screen, in order.
        beside: the models that are asked and not trained; found once the run is to begin.
    """

    task: BaseTask
    objective: Objective
    loss: TrainingLoss
    model: PlannedModel
    data: Prepared
    targets: MethodTargets
    schedule: Schedule
    fast: FastPlan
    best: BestModel | None
    adapter: StartingAdapter | None
    choices: list[Choice]
    beside: Beside = field(default_factory=Beside)

    @property
    def base(self) -> Base:
        """What a method must know of the model that it is put onto."""
        model, targets = self.model, self.targets
        return Base(
            config=model.config,
            kind=model.kind,
            task_type=self.task.peft_types.get(model.kind),
            targets=targets.modules,
            # PEFT adds names of its own to it, and those of an adapter may name a head again.
            heads=list(dict.fromkeys([*model.heads, *targets.in_full])),
            fan_in_fan_out=targets.fan_in_fan_out,
            total_steps=self.schedule.steps,
            tokenizer=model.tokenizer,
            parameters=targets.parameters,
        )


def model_choice(config: TrainConfig, model_type: str, total: int, source: ModelSource) -> Choice:
    """Return the line of the model."""
    size = f"{model_type}, {total / 1e6:,.1f} M parameters"
    default = config.model.name_or_path == DEFAULT_MODEL
    return Choice("model", source.name, size + ("; the built-in model" if default else ""))


def method_choices(config: TrainConfig, quantized_already: bool) -> list[Choice]:
    """Return the lines of the method, of a quantized base and of the batch."""
    method, quant, train = config.method, config.quant, config.train
    shown = []
    shown.append(Choice("method", method.kind, _describe(method)))
    if quant.kind != "none":
        origin = "quantized in its checkpoint; " if quantized_already else ""
        shown.append(Choice("base", quant.form, f"{origin}heads kept in float"))
    factors = {"accumulated": train.gradient_accumulation_steps,
               "processes": train.num_processes or 1}  # fmt: skip
    batch = train.per_device_train_batch_size * math.prod(factors.values())
    parts = [f"{number} {name}" for name, number in factors.items() if number > 1]
    reason = " × ".join([str(train.per_device_train_batch_size), *parts]) if parts else ""
    shown.append(Choice("batch", f"{batch} rows a step", reason))
    return shown


def _describe(method: MethodConfig) -> str:
    """Return the settings of a method in a few words."""
    own = METHODS[method.kind].describe
    if own is not None:
        return own(method)
    fields = method.model_dump(exclude={"kind", "target_modules"})
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)


def head_choices(task: BaseTask, heads: list[str]) -> list[Choice]:
    """Return the line of the modules that are trained in full, if there are any."""
    return [Choice("heads", ", ".join(heads), task.why_heads)] if heads else []
