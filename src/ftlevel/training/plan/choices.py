"""What the screen says of a plan: each value that was chosen, with its reason."""

from __future__ import annotations

import math

from ftlevel.config import DEFAULT_MODEL, MethodConfig, TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.methods import METHODS
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import BaseTask


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
