"""A run before the weights are loaded: `Run`, its model, schedule and lines for display."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import (
    DEFAULT_MODEL,
    MethodConfig,
    ModelConfig,
    QuantConfig,
    TrainConfig,
    TrainerConfig,
)
from ftlevel.config.section import Choice
from ftlevel.data.prepare.encoder import PreparedData
from ftlevel.data.sources.lines import STDIN, is_pipe
from ftlevel.data.sources.readers import is_pattern
from ftlevel.fast.plan import FastPlan
from ftlevel.methods import METHODS, Base
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import replace_conv1d
from ftlevel.models.sources import ModelSource
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.tasks import BaseTask
from ftlevel.trained.adapt import apply_method
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.best import BestModel
from ftlevel.training.hooks import TrainingHooks, hooks_of
from ftlevel.training.plan.method import MethodTargets


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """The base model before the weights are loaded.

    Attributes:
        kind: encoder, decoder or encoder-decoder.
        config: transformers config with labels and padding for the task.
        heads: modules trained in full, next to the adapter.
        new_modules: modules whose weights may be missing from the checkpoint.
        new_heads: heads missing from the checkpoint, randomly initialized.
        unused: modules that do not affect the loss and stay frozen.
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
    unused: list[str]

    @property
    def family(self) -> str:
        """The model type: `model_type` of the config."""
        return str(self.config.model_type)

    @property
    def pad_id(self) -> int:
        """Padding token id."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocabulary(self) -> int:
        """Vocabulary size of the config."""
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Optimizer steps and peak learning rates; `head_learning_rate` is None without new heads."""

    steps: int
    steps_per_epoch: int
    learning_rate: float
    default_learning_rate: float
    head_learning_rate: float | None


@dataclass(frozen=True)
class StartingAdapter:
    """Adapter to continue from; `card` (ftlevel.json) is None if plain PEFT wrote it."""

    name: str
    directory: Path
    settings: Mapping[str, Any]
    card: AdapterCard | None
    fingerprint: str

    @property
    def choice(self) -> Choice:
        """The line about the adapter that is printed at the start of the run."""
        how = "by plain PEFT" if self.card is None else f"for {self.card.task}"
        return Choice("adapter", self.name, f"trained {how}; its base and method are used")

    def describe(self) -> dict[str, Any]:
        """Returns the adapter's entry in summary.json."""
        return {"name": self.name, "fingerprint": self.fingerprint}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration, and all that is derived from it before the weights are loaded.

    Attributes:
        model: the base model; `model.quant` includes the quantization of the checkpoint,
            `config.quant` does not.
        best: how the best model is selected; None if it is not.
        adapter: adapter to continue from; None for a new adapter.
        auxiliary: dotted field, such as `distillation.teacher` → model named there, which is used
            but not trained; resolved when the run starts.
        written_base: directory to which a base passed as an object was written.
        recomputes: whether gradient checkpointing, set to auto, was chosen for the run.
        resources: what the task opened for the run, such as reward functions; None for most.
    """

    config: TrainConfig
    task: BaseTask
    objective: Objective
    loss: TrainingLoss
    model: PlannedModel
    data: PreparedData
    targets: MethodTargets
    schedule: Schedule
    fast: FastPlan
    best: BestModel | None
    adapter: StartingAdapter | None
    choices: list[Choice]
    auxiliary: Mapping[str, ReferenceModel] = field(default_factory=dict)
    written_base: Path | None = None
    resources: Any = None
    recomputes: bool = False

    @property
    def hooks(self) -> TrainingHooks:
        """What the task changes in training."""
        return hooks_of(self.task)

    def with_settings(self, section: str, **values: Any) -> Run:
        """Returns the run with fields of configuration section `section` replaced, unvalidated."""
        new_section = getattr(self.config, section).model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={section: new_section}))

    @property
    def name(self) -> str:
        """Name of the run: the user's, or METHOD-MODEL-DATA."""
        config = self.config
        if config.output.run_name is not None:
            return config.output.run_name
        model = config.model.name_or_path.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
        if config.data.dataset == STDIN or is_pipe(Path(config.data.dataset)):
            data = "stdin" if config.data.dataset == STDIN else "pipe"
        else:  # the directory of a pattern such as parts/*.jsonl
            names = config.data.dataset.removeprefix("builtin:").rstrip("/").split("/")
            data = next((part for part in reversed(names) if not is_pattern(part)), "files")
        model, data = model.removesuffix(".gguf"), data.partition(".")[0]
        return f"{config.method.kind}-{model}-{data}"

    @property
    def base(self) -> Base:
        """Properties of the base model from which a method builds its adapter."""
        model, targets = self.model, self.targets
        return Base(
            config=model.config,
            architecture=model.kind,
            task_type=self.task.peft_types.get(model.kind),
            targets=targets.modules,
            # PEFT appends names to this list; an adapter's names may repeat a head.
            heads=list(dict.fromkeys([*model.heads, *targets.full_modules])),
            fan_in_fan_out=targets.fan_in_fan_out,
            total_steps=self.schedule.steps,
            tokenizer=model.tokenizer,
            parameters=targets.parameters,
            unused=model.unused,
        )


def model_choice(model: ModelConfig, model_type: str, total: int, source: ModelSource) -> Choice:
    """Returns the line to print about the model; `total` is its number of parameters."""
    size = f"{model_type}, {total / 1e6:,.1f} M parameters"
    default = model.name_or_path == DEFAULT_MODEL
    return Choice("model", source.name, size + ("; the built-in model" if default else ""))


def method_choices(
    method: MethodConfig, quant: QuantConfig, train: TrainerConfig, quantized_already: bool
) -> list[Choice]:
    """Returns the printed lines on method, quantization (`quantized_already`: on disk), batch."""
    choices = [Choice("method", method.kind, METHODS[method.kind].format_spec(method))]
    if quant.kind != "none":
        stored = "quantized in its checkpoint; " if quantized_already else ""
        choices.append(Choice("base", quant.form, f"{stored}heads kept in float"))
    factors = {
        "accumulated": train.gradient_accumulation_steps,
        "processes": train.num_processes or 1,
    }
    batch = train.per_device_train_batch_size * math.prod(factors.values())
    terms = [f"{number} {name}" for name, number in factors.items() if number > 1]
    note = " × ".join([str(train.per_device_train_batch_size), *terms]) if terms else ""
    choices.append(Choice("batch", f"{batch} rows a step", note))
    return choices


def size_choices(run: Run, *, build_modules: bool) -> list[Choice]:
    """Returns the printed lines on parameters and steps; see `count_trainable`."""
    count = run.config.train.num_train_epochs
    epochs = f"{count:g} epoch{'s' * (count != 1)}"
    note = "" if run.config.train.max_steps else f"{epochs} of {len(run.data.train):,} rows"
    trainable, total = count_trainable(run, build_modules=build_modules)
    return [
        Choice("trainable", f"{trainable:,} of {total:,}", f"{trainable / total:.2%}"),
        Choice("steps", f"{run.schedule.steps:,}", note),
    ]


def count_trainable(run: Run, *, build_modules: bool = False) -> tuple[int, int]:
    """Returns the number of trainable and of all parameters, without loading weights.

    The method's own formula is used if there is one, since building all adapter modules is slow
    even on the meta device. With `build_modules`, as in a dry run, the modules are built anyway.
    """
    method, total = run.config.method, run.model.total_parameters
    method_info = METHODS[method.kind]
    if not (build_modules or run.base.heads or run.targets.parameters):
        num_added = method_info.num_parameters(method, run.targets.sizes)
        if num_added is not None:
            return num_added, total + num_added
    meta = build_task_model(run.model.config, run.model.auto_class)
    if run.model.quant.kind != "none":
        replace_conv1d(meta)
    model = apply_method(meta, method_info.initialization.without_weights(method), run.base)
    return count_parameters(model)


def count_parameters(model: Any) -> tuple[int, int]:
    """Returns the number of trainable and of all parameters of `model`; tied ones count once.

    The frozen original that PEFT's `ModulesToSaveWrapper` keeps next to its copy is not counted.
    """
    from peft.utils import ModulesToSaveWrapper

    frozen_copies = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    named = model.named_parameters(remove_duplicate=False)
    parameters = {id(p): p for name, p in named if not name.startswith(frozen_copies)}.values()
    return sum(p.numel() for p in parameters if p.requires_grad), sum(
        _num_values(p) for p in parameters
    )


def _num_values(parameter: Any) -> int:
    """Returns how many values `parameter` has; 4-bit weights pack two per byte."""
    is_quantized = type(parameter).__name__ == "Params4bit" or hasattr(parameter, "quant_state")
    return parameter.numel() * (2 if is_quantized else 1)
