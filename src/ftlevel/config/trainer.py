"""Training hyperparameters, and the arguments of optimizers and schedules in transformers.

Arguments that would be ignored raise an error; transformers drops most of them silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.output import Decoding
from ftlevel.config.section import ClassWeights, FewNames, Positive, Scalar, Scalars, Share
from ftlevel.errors import has_no_effect, join_names

_NO_PACKAGE = "it needs a package that ftlevel does not install"
_LOW_RANK = (
    "it projects gradients of full weights to a low rank, and those of an adapter are small. Use "
    "adamw_8bit to save memory"
)
_FUSED_BACKWARD = "it updates weights in the backward pass, where gradients are not checked"
_EXCLUDED = {
    "galore": _LOW_RANK,
    "apollo": _LOW_RANK,
    "lomo": _FUSED_BACKWARD,
    "adalomo": _FUSED_BACKWARD,
    "schedule_free": "it has its own schedule, and evaluates other weights than it trains",
    "adamw_torch_4bit": "its state cannot be copied. Use adamw_8bit",
    "adamw_torch_8bit": "its state cannot be copied. Use adamw_8bit",
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu": "it is for NPUs",
    "adamw_anyprecision": _NO_PACKAGE,
    "grokadamw": _NO_PACKAGE,
    "stable_adamw": _NO_PACKAGE,
    "rmsprop_bnb": "transformers passes its settings as strings. Use rmsprop",
}


def _check_optimizer(value: object) -> object:
    if isinstance(value, str):
        for start, error in _EXCLUDED.items():
            if value.startswith(start):
                raise ValueError(f"{error}. --help-all lists all optimizers")
    return value


Optimizer = Annotated[
    Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "ademamix",
        "ademamix_8bit",
        "paged_ademamix_8bit",
        "paged_ademamix_32bit",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
        "rmsprop",
        "adagrad",
        "sgd",
    ],
    BeforeValidator(_check_optimizer),
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]

PLATEAU = "reduce_lr_on_plateau"
_WITHOUT_WARMUP = ("constant", PLATEAU)
_FLOOR = ("min_lr", "min_lr_rate")


@dataclass(frozen=True)
class AllowedKwargs:
    """Arguments that an optimizer or schedule accepts; exactly one of `required` must be set."""

    names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


SCHEDULES: Mapping[str, AllowedKwargs] = {
    "cosine": AllowedKwargs(("num_cycles",)),
    "cosine_with_restarts": AllowedKwargs(("num_cycles",)),
    "cosine_with_min_lr": AllowedKwargs(("num_cycles", *_FLOOR), _FLOOR),
    "cosine_warmup_with_min_lr": AllowedKwargs(("num_cycles", *_FLOOR, "warmup_lr_rate"), _FLOOR),
    "polynomial": AllowedKwargs(("lr_end", "power")),
    "inverse_sqrt": AllowedKwargs(("timescale",)),
    "warmup_stable_decay": AllowedKwargs(
        (
            "num_decay_steps",
            "num_stable_steps",
            "warmup_type",
            "decay_type",
            "min_lr_ratio",
            "num_cycles",
        ),
        ("num_decay_steps",),
    ),
    PLATEAU: AllowedKwargs(
        ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")
    ),
}
"""Schedule → arguments of its transformers function, except those that the run sets."""

OPTIMIZERS: Mapping[str, AllowedKwargs] = {
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
        AllowedKwargs(("beta3", "alpha", "t_alpha", "t_beta3")),
    ),
    "rmsprop": AllowedKwargs(("momentum", "alpha", "eps", "centered")),
    "adagrad": AllowedKwargs(("lr_decay", "eps")),
    "sgd": AllowedKwargs(("momentum", "dampening", "nesterov")),
}
"""Optimizer → arguments besides --learning-rate, --weight-decay and --adam-*."""

LEARNING_RATE_ADVICE = {
    "lion": "Lion needs a third to a tenth of that (Chen et al., 2023, section 5)",
    "sgd": "SGD needs a far higher one",
    "adagrad": "Adagrad needs a higher one",
    "rmsprop": "RMSprop takes larger first steps and needs a lower one",
}
"""Optimizers whose best learning rate differs from the measured defaults (AdamW)."""

_ALLOWED_VALUES: Mapping[str, tuple[Scalar, ...]] = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "threshold_mode": ("rel", "abs"),
    "centered": (True, False),
    "nesterov": (True, False),
}
"""Arguments that are not numbers, and their allowed values."""

_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def validate_optimizer(train: Any) -> Iterator[str]:
    """Yields a message per setting in section `train` that its optimizer or schedule cannot use."""
    schedule, optim = train.lr_scheduler_type, train.optim
    owner, kwargs = f"--lr-scheduler-type {schedule}", SCHEDULES.get(schedule, AllowedKwargs())
    yield from _validate_kwargs("--lr-scheduler-kwargs", owner, train.lr_scheduler_kwargs, kwargs)
    kwargs = OPTIMIZERS.get(optim, AllowedKwargs())
    yield from _validate_kwargs("--optim-args", f"--optim {optim}", train.optim_args, kwargs)
    if train.warmup_steps and schedule in _WITHOUT_WARMUP:
        fix = "Use constant_with_warmup, or drop --warmup-steps."
        flag, reason = f"--warmup-steps {train.warmup_steps:g}", "it has no warm-up"
        yield has_no_effect(flag, owner, reason, fix)
    is_adam = "adam" in optim or "ademamix" in optim
    for name, default in _ADAM.items():
        value = getattr(train, name)
        if value != default and not (is_adam or ("lion" in optim and name != "adam_epsilon")):
            yield has_no_effect(f"--{name.replace('_', '-')} {value:g}", f"--optim {optim}")


def _validate_kwargs(
    flag: str, owner: str, values: Mapping[str, Scalar], allowed_kwargs: AllowedKwargs
) -> Iterator[str]:
    if unknown := [name for name in values if name not in allowed_kwargs.names]:
        names = join_names(allowed_kwargs.names)
        has = f"It has {names}." if names else "It has none. Drop it."
        yield f"{flag} {join_names(unknown)}: no setting of {owner}. {has}"
    for name, value in values.items():
        allowed = _ALLOWED_VALUES.get(name, ())
        if allowed and value not in allowed:
            yield f"{flag} {name}={value}: expected {join_names(map(_format_value, allowed))}."
        elif not allowed and (isinstance(value, bool | str) or value < 0):
            yield f"{flag} {name}={value}: expected a number, 0 or more."
    required = allowed_kwargs.required
    if required and sum(name in values for name in required) != 1:
        yield (
            f"{owner} needs {'one of ' * (len(required) > 1)}{' or '.join(required)}: {flag} "
            f"{required[-1]}={'0.1' if 'rate' in required[-1] else '100'}."
        )


def _format_value(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Steps = Positive | Annotated[float, Field(gt=0.0, lt=1.0)]
"""Number of steps, or, below 1, fraction of the run, as in transformers."""


class TrainerConfig(Decoding):
    """Training hyperparameters; names are those of `transformers.TrainingArguments`."""

    num_train_epochs: float = Field(3.0, gt=0, le=10_000, description="Number of training epochs.")
    max_steps: Positive | None = Field(
        None, description="Maximum number of optimizer steps; overrides the epochs."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Peak learning rate; default: by method, model kind and size, and steps."
    )
    head_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Peak learning rate of a new head. Default: learning_rate if given, else "
        "chosen for the head.",
    )
    lr_scheduler_type: Schedule = Field(
        "linear", description="Learning-rate schedule after warm-up."
    )
    lr_scheduler_kwargs: Scalars = Field(
        default_factory=dict,
        description="Scheduler arguments, e.g. num_cycles=3 or min_lr_rate=0.1.",
        examples=[{"num_cycles": 3}],
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Number of warm-up steps, or, below 1, fraction of all steps."
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Weight decay; decoupled from the gradient in AdamW."
    )
    adam_beta1: Share = Field(0.9, description="Beta1 of AdamW (first moment).")
    adam_beta2: Share = Field(0.999, description="Beta2 of AdamW (second moment).")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Maximum gradient norm for clipping; 0 disables clipping."
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="Action when loss or gradient is NaN: stop, skip or rollback. Also for "
        "infinite values. skip ignores the step; rollback also restores the newest checkpoint's "
        "weights and does not repeat the steps since.",
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="Loss spike threshold: multiple of the median loss of the last 20 steps. A "
        "step above it is skipped, and the newest checkpoint's weights, if any, are restored. "
        "Default: off.",
    )
    label_smoothing_factor: Share = Field(
        0.0, description="Label smoothing factor, for training only."
    )
    class_weights: ClassWeights = None
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="Gamma of the focal loss, for training only; 0 disables it. The loss is "
        "multiplied by (1 - p) to this power (Lin et al., 2017).",
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Scale of the NEFTune noise added to embeddings in training (Jain et al., "
        "2023). It turns off the fast step.",
    )
    optim: Optimizer = Field("adamw_torch_fused", description="Optimizer, by name in transformers.")
    optim_args: Scalars = Field(
        default_factory=dict,
        description="Optimizer arguments, e.g. momentum=0.9.",
        examples=[{"momentum": 0.9}],
    )
    per_device_train_batch_size: Positive = Field(8, description="Micro-batch size per device.")
    per_device_eval_batch_size: Positive | None = Field(
        None, description="Evaluation batch size per device; default: the training batch size."
    )
    gradient_accumulation_steps: Positive = Field(
        1, description="Number of micro-batches per optimizer step."
    )
    num_processes: Positive | None = Field(
        None,
        description="Number of processes, one per device. Each has micro-batches of "
        "per_device_train_batch_size rows. Default: one, or as started by torchrun.",
    )
    shard: Literal["none", "grads", "full"] = Field(
        "none",
        description="Shard the model across processes with FSDP2, for models that do not fit on "
        "one device. full gathers each block in forward and backward; grads keeps each block "
        "gathered between forward and backward.",
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        0,
        description="Maximum number of restarts after a process fails or is killed. Each restart "
        "resumes from the newest complete checkpoint; needs several processes.",
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        "random",
        description="Row order in an epoch; group_by_length reduces padding. Useful where rows "
        "cannot be packed.",
    )
    gradient_checkpointing: Annotated[
        bool | None, BeforeValidator(lambda value: None if value == "auto" else value)
    ] = Field(
        None,
        description="Whether to recompute activations in the backward pass to save memory. "
        "Default (auto): in all blocks, if a step is estimated to need more than 80 % of a "
        "GPU's free memory; none on a CPU.",
    )
    offload_activations: bool = Field(
        False,
        description="Whether to offload checkpointed activations to CPU memory. For long rows "
        "on a GPU; recomputes all blocks.",
    )
    tf32: bool | None = Field(
        None,
        description="Whether to use TF32 for float32 matmuls on a GPU (Ampere or later). Eight "
        "times as fast, with 10 bits of mantissa; default: on.",
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Random seed for weights, dropout and row order."
    )
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Random seed for the row order; default: seed."
    )
    logging_steps: Steps | None = Field(
        None,
        description="Logging interval in steps, or, below 1, fraction of the run. Default: "
        "about 20 times per run.",
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="Evaluation schedule: steps, epoch or no. Default: steps if eval_steps is "
        "given, else epoch.",
    )
    eval_steps: Steps | None = Field(
        None,
        description="Evaluation interval in steps, or, below 1, fraction of the run. Default: "
        "the end of each epoch.",
    )
    eval_on_start: bool = Field(False, description="Whether to evaluate before training.")
    load_best_model_at_end: bool | None = Field(
        None,
        description="Whether to keep the best model instead of the last. Default: yes, if there"
        " are several evaluations on validation rows.",
    )
    metric_for_best_model: str | None = Field(
        None,
        min_length=1,
        description="Metric that selects the best model, with or without eval_. Default: the "
        "task's main metric if computed on all rows, else loss.",
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether a higher metric_for_best_model is better. Default: inferred from "
        "its name; no for losses, perplexities and errors.",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="Number of evaluations without improvement before stopping. Default: never.",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="Minimum improvement that early stopping counts."
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None,
        description="Checkpoint schedule: steps, epoch, best or no. Default: steps if save_steps "
        "is given; else every save_minutes, plus one at the end if it takes at most 512 MB.",
    )
    save_steps: Steps | None = Field(
        None, description="Checkpoint interval in steps, or, below 1, fraction of the run."
    )
    save_minutes: float = Field(
        10.0,
        ge=0,
        description="Maximum minutes between checkpoints; 0: no maximum. If this saves one, "
        "another is saved at the end.",
    )
    save_total_limit: Positive = Field(2, description="Maximum number of checkpoints to keep.")
    metrics: FewNames = Field(
        (), description="Comma-separated metrics besides the loss; default: all of the task."
    )
    predict_with_generate: bool | None = Field(
        None, description="Whether to generate text for ROUGE; default: depends on the task."
    )
    max_generate_samples: Positive = Field(
        32, description="Number of validation rows to generate text for, for metrics."
    )
    max_new_tokens: Positive = Field(64, description="Maximum number of generated tokens.")

    @property
    def order_seed(self) -> int:
        """Random seed of the order of training rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def rows_per_device_step(self) -> int:
        """Number of rows per optimizer step and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_per_step(self) -> int:
        """Number of rows per optimizer step, over all processes."""
        return self.rows_per_device_step * (self.num_processes or 1)

    @property
    def recomputes(self) -> bool:
        """Whether all blocks use gradient checkpointing, whatever the device."""
        return self.gradient_checkpointing is True or self.offload_activations

    def may_recompute(self, device: str) -> bool:
        """Returns whether gradient checkpointing is on, or chosen automatically on `device`."""
        return self.recomputes or (self.gradient_checkpointing is None and device == "cuda")
