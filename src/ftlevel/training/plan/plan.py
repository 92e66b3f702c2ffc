"""What a run will do, as facts: a few groups of what travels together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config import QuantConfig
from ftlevel.config.choices import Choice
from ftlevel.data.prepare.context import Prepared
from ftlevel.fast.plan.fast_plan import FastPlan
from ftlevel.methods import Base
from ftlevel.models.sources import ModelSource
from ftlevel.task import Objective, TrainingLoss
from ftlevel.tasks import BaseTask
from ftlevel.trained.another import Another
from ftlevel.training.plan.adapter import StartingAdapter
from ftlevel.training.plan.best_model import BestModel
from ftlevel.training.plan.method_targets import MethodTargets


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
