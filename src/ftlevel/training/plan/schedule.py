"""Number of steps, learning rates, training loss and sequence length bounds of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.config import DEFAULT_MODEL, DataConfig, MethodConfig, ModelConfig
from ftlevel.config.section import Choice
from ftlevel.config.trainer import LEARNING_RATE_ADVICE, PLATEAU, TrainerConfig
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.encoder import PreparedData
from ftlevel.data.prepare.samplers import count_padded_rows
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.methods import METHODS
from ftlevel.methods.rates import RateInputs, get_head_rate
from ftlevel.models.hardware import DTYPES, MemorySettings, device_memory, max_length_in_memory
from ftlevel.models.kinds import max_positions
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.training.plan.run import Schedule


def count_steps_per_epoch(config: TrainerConfig, num_rows: int) -> int:
    """Returns the optimizer steps per epoch of `num_rows` rows."""
    num_batches = math.ceil(
        num_rows / config.per_device_train_batch_size / (config.num_processes or 1)
    )
    return max(math.ceil(num_batches / config.gradient_accumulation_steps), 1)


def rows_per_epoch(train: TrainerConfig, steps_per_batch: int, data: PreparedData) -> int:
    """Returns how many rows an epoch trains on, counting repetitions and padding.

    A row counts once for each of the `steps_per_batch` steps that train on it in a row. If
    these are several, or if rows are in sets, an incomplete last step counts as a full one.
    """
    step, num_rows = train.rows_per_step, len(data.train)
    if data.sets:
        return count_padded_rows(data.sets, step)
    if steps_per_batch == 1:
        return num_rows
    return math.ceil(num_rows / step) * step * steps_per_batch  # the last step is filled


def count_steps(config: TrainerConfig, num_rows: int) -> int:
    """Returns the optimizer steps of a run on `num_rows` rows."""
    return config.max_steps or math.ceil(
        config.num_train_epochs * count_steps_per_epoch(config, num_rows)
    )


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates: `head` of new heads, `base` of all else; `default` is base's default."""

    base: Choice
    default: float
    head: Choice | None

    @property
    def choices(self) -> list[Choice]:
        """Lines printed at the start: the base rate, and the head rate if that differs."""
        has_head_rate = self.head is not None and self.head.value != self.base.value
        return [self.base, self.head] if has_head_rate and self.head else [self.base]

    def schedule(self, steps: int, steps_per_epoch: int) -> Schedule:
        """Returns the schedule of a run of `steps` optimizer steps."""
        return Schedule(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            learning_rate=self.base.value,
            default_learning_rate=self.default,
            head_learning_rate=self.head.value if self.head else None,
        )


def resolve_rates(
    spec: MethodConfig, train: TrainerConfig, info: RateInputs, factor: float = 1, source: str = ""
) -> LearningRates:
    """Returns the peak learning rates: the user's, or the method's defaults for the run.

    New heads use `--head-learning-rate`, else `--learning-rate`. The default is multiplied by the
    task's `factor`; `source` says where this factor is from.
    """
    base = head = None
    if train.learning_rate is not None:
        base = Choice("learning rate", train.learning_rate)
    if train.head_learning_rate is not None:
        head = Choice("head learning rate", train.head_learning_rate)
    elif base is not None:
        head = Choice("head learning rate", base.value)
    rates = METHODS[spec.kind].rates(spec)
    default = rates.get_choice(spec.kind, info)
    if factor != 1:
        message = f"{factor:.2g} times the supervised rate, {source}: {default.reason}"
        default = replace(default, value=float(f"{default.value * factor:.0e}"), reason=message)
    base = base or default
    head = head or (base if rates.is_heads else get_head_rate(info))
    return LearningRates(base, default.value, head if info.new_head else None)


def get_default_model_warnings(model: ModelConfig, data: DataConfig) -> list[str]:
    """Returns a warning if the built-in model, the default, is trained on the user's data."""
    is_user_data = not data.dataset.startswith("builtin:")
    if not is_user_data or "name_or_path" in model.model_fields_set:
        return []
    return [
        f"no --model given: the built-in model with 2.6 M parameters ({DEFAULT_MODEL}) is "
        f"trained on {data.dataset}, as a demo. For real use, add for example --model "
        f"HuggingFaceTB/SmolLM2-135M-Instruct."
    ]


def check_schedule(config: TrainerConfig, rate: float, steps: int, num_eval_samples: int) -> None:
    """Raise ConfigError for schedule options unsuitable for `steps` steps or the peak `rate`."""
    name, options, errors = config.lr_scheduler_type, config.lr_scheduler_kwargs, []
    flag = "--lr-scheduler-kwargs"
    for floor in ("min_lr", "lr_end"):
        if (low := options.get(floor)) is not None and not 0 <= float(low) < rate:
            errors.append(
                f"{flag} {floor}={low}: it must be below the learning rate {rate:g}. Use less "
                f"than {rate:g}, or a higher --learning-rate."
            )
    if name == PLATEAU and (not num_eval_samples or config.eval_strategy == "no"):
        errors.append(
            f"--lr-scheduler-type {name} needs validation rows. Add --validation-split 0.05, or "
            f"use another."
        )
    if (decay := options.get("num_decay_steps")) is not None:
        warmup = config.warmup_steps * (steps if config.warmup_steps < 1 else 1)
        if float(decay) + warmup > steps:
            errors.append(
                f"{flag} num_decay_steps={decay}: the run has {steps:,} steps, of which "
                f"{warmup:,.0f} are warm-up. Use at most {steps - warmup:.0f}."
            )
    if errors:
        raise ConfigError(errors)


def get_schedule_warnings(
    config: TrainerConfig, steps: int, num_eval_samples: int, *, new_head: bool = True
) -> list[str]:
    """Returns warnings about settings that have no effect or do not suit a run of `steps` steps."""
    messages = []
    if config.warmup_steps > steps:
        reached = (steps - 1) / int(config.warmup_steps)
        messages.append(
            f"--warmup-steps {config.warmup_steps:,g} is longer than the run of {steps:,} steps: "
            f"the learning rate ends at {reached:.0%} of its peak."
        )
    if config.learning_rate is None and (
        advice := LEARNING_RATE_ADVICE.get(config.optim.removeprefix("paged_").split("_")[0])
    ):
        messages.append(
            f"--optim {config.optim}: the default learning rate was measured with AdamW, and "
            f"{advice}. Set --learning-rate."
        )
    if config.head_learning_rate is not None and not new_head:
        messages.append("--head-learning-rate: the model has no new head. Use --learning-rate.")
    eval_options = {
        "--eval-steps": config.eval_steps,
        "--eval-strategy": config.eval_strategy in ("steps", "epoch"),
        "train.eval_on_start": config.eval_on_start,
    }
    if not num_eval_samples and any(eval_options.values()):
        name = next(name for name, value in eval_options.items() if value)
        messages.append(
            f"{name}: there are no validation rows to evaluate. Add --validation-split 0.05."
        )
    return messages


_MAX_WEIGHTS_SHOWN = 8  # most class weights on a line


def resolve_training_loss(
    train: TrainerConfig,
    objective: Objective,
    names: Sequence[str],
    rows: Sequence[Encoded],
) -> tuple[TrainingLoss, list[Choice]]:
    """Returns the training loss, and lines that show it; `names` are class or tag names.

    `rows` are the training rows, used to balance classes. Raises ConfigError if the loss is not
    available for this objective.
    """
    _check_loss(train, objective)
    class_weights, choices = train.class_weights, list[Choice]()
    weights: tuple[float, ...] = ()
    if class_weights == "balanced":
        weights = objective.balance(rows, len(names))
        note = (
            "balanced: targets / (classes × targets of the class)"
            if objective.one_of_many
            else "balanced: rows without a class / rows with it"
        )
    elif class_weights:
        weights = _parse_weights(class_weights, names)
        note = "" if len(class_weights) == len(names) else "1 where none is given"
    if weights:
        choices.append(
            Choice("class weights", _format_weights(dict(zip(names, weights, strict=True))), note)
        )
    choices += objective.describe_loss()
    smoothing = 0.0 if objective.has_own_smoothing else train.label_smoothing_factor
    return TrainingLoss(smoothing, weights, train.focal_gamma), choices


def _check_loss(train: TrainerConfig, objective: Objective) -> None:
    errors = []
    if train.label_smoothing_factor and not objective.one_of_many:
        errors.append(
            f"--label-smoothing-factor {train.label_smoothing_factor:g} needs labels of a single "
            f"token, tag or class. Drop it."
        )
    for flag, is_set in (
        ("--class-weights", train.class_weights is not None),
        (f"--focal-gamma {train.focal_gamma:g}", train.focal_gamma > 0),
    ):
        if is_set and not objective.has_classes:
            errors.append(f"{flag} needs classes or tags, and these rows have none. Drop it.")
    if errors:
        raise ConfigError(errors)


def _parse_weights(weights: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    invalid = [name for name in weights if name not in names]
    if invalid:
        raise ConfigError(
            f"--class-weights: there is no class {join_names(map(repr, invalid))}."
            f"{did_you_mean(invalid[0], names)} Classes here: {join_names(names, 20)}."
        )
    return tuple(weights.get(name, 1.0) for name in names)


def _format_weights(weights: Mapping[str, float]) -> str:
    ordered = sorted(weights.items(), key=lambda item: item[1])
    items = [f"{name} {weight:.3g}" for name, weight in ordered]
    if len(items) <= _MAX_WEIGHTS_SHOWN:
        return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    half = _MAX_WEIGHTS_SHOWN // 2
    return f"{', '.join(items[:half])} … {', '.join(items[-half:])}: {len(items)} classes"


_BYTES_PER_WEIGHT = {"4bit": 0.5, "8bit": 1.0}


def get_length_bounds(
    method: MethodConfig,
    quant: str,
    train: TrainerConfig,
    model_config: Any,
    device: str,
    dtype: str,
) -> LengthBounds:
    """Returns upper bounds of a row's length in tokens: by the model, and by device memory."""
    value = DTYPES[dtype].itemsize
    trained = METHODS[method.kind].trains_base(method)
    memory_config = MemorySettings(
        weight=4.0 if trained else _BYTES_PER_WEIGHT.get(quant, float(value)),
        value=value,
        trained=trained,
        checkpointing=train.may_recompute(device),
    )
    memory = max_length_in_memory(model_config, memory_config, device_memory(device))
    return LengthBounds(text_positions(method, model_config), memory)


def text_positions(spec: MethodConfig, model_config: Any) -> int | None:
    """Returns the model's maximum length minus the method's virtual tokens; None if unlimited.

    Raises ConfigError if nothing is left.
    """
    positions = max_positions(model_config)
    num_virtual_tokens = METHODS[spec.kind].positions(spec)
    if positions is None or not num_virtual_tokens:
        return positions
    if num_virtual_tokens >= positions:
        raise ConfigError(
            f"--method {spec.kind} with num_virtual_tokens {num_virtual_tokens:,} leaves no "
            f"positions for text ({positions:,} in {model_config.model_type}). Use fewer."
        )
    return positions - num_virtual_tokens
