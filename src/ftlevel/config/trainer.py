"""How a run is optimised, watched and saved: the section `train` of a configuration.

Which optimizers and schedules there are, and what may be set of each; names as transformers'.

A name or a setting that transformers would not read is refused: it drops most of these in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.output import Decoding
from ftlevel.config.preference import ClassWeights, FewNames, Scalar, Scalars
from ftlevel.config.section import Positive, Share
from ftlevel.errors import listing

_NO_PACKAGE = "its package is not one of ftlevel's"
_LOW_RANK = (
    "it keeps the gradients of whole weights in low rank, and an adapter's are small. Use "
    "adamw_8bit to save memory"
)
_FUSED_BACKWARD = "it takes its step inside the backward pass, where gradients are not checked"
_REFUSED = {
    "galore": _LOW_RANK,
    "apollo": _LOW_RANK,
    "lomo": _FUSED_BACKWARD,
    "adalomo": _FUSED_BACKWARD,
    "schedule_free": "it keeps its own schedule, and other weights in evaluation than in training",
    "adamw_torch_4bit": "what it remembers cannot be copied. Use adamw_8bit",
    "adamw_torch_8bit": "what it remembers cannot be copied. Use adamw_8bit",
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu": "it is for NPUs",
    "adamw_anyprecision": _NO_PACKAGE,
    "grokadamw": _NO_PACKAGE,
    "stable_adamw": _NO_PACKAGE,
    "rmsprop_bnb": "transformers hands it its settings as words. Use rmsprop",
}


def _is_offered(value: object) -> object:
    """Say why an optimizer of transformers' is not offered."""
    if isinstance(value, str):
        for start, reason in _REFUSED.items():
            if value.startswith(start):
                raise ValueError(f"{reason}. Use one of --help-all")
    return value


Optimizer = Annotated[
    Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "adafactor", "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
        "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "rmsprop", "adagrad",
        "sgd",
    ],
    BeforeValidator(_is_offered),
]  # fmt: skip
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    "reduce_lr_on_plateau",
]  # fmt: skip

PLATEAU = "reduce_lr_on_plateau"
_NO_WARMUP = ("constant", PLATEAU)
_FLOOR = ("min_lr", "min_lr_rate")


@dataclass(frozen=True)
class Settings:
    """What may be set of an optimizer or a schedule.

    Attributes:
        names: of all settings.
        needed: settings of which exactly one must be given; empty where none must.
    """

    names: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()


SCHEDULES: Mapping[str, Settings] = {
    "cosine": Settings(("num_cycles",)),
    "cosine_with_restarts": Settings(("num_cycles",)),
    "cosine_with_min_lr": Settings(("num_cycles", *_FLOOR), _FLOOR),
    "cosine_warmup_with_min_lr": Settings(("num_cycles", *_FLOOR, "warmup_lr_rate"), _FLOOR),
    "polynomial": Settings(("lr_end", "power")),
    "inverse_sqrt": Settings(("timescale",)),
    "warmup_stable_decay": Settings(
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio",
         "num_cycles"), ("num_decay_steps",)),
    PLATEAU: Settings(
        ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")),
}  # fmt: skip
"""Schedule → the settings of transformers' function, but for those that a run decides."""

OPTIMIZERS: Mapping[str, Settings] = {
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
                    Settings(("beta3", "alpha", "t_alpha", "t_beta3"))),
    "rmsprop": Settings(("momentum", "alpha", "eps", "centered")),
    "adagrad": Settings(("lr_decay", "eps")),
    "sgd": Settings(("momentum", "dampening", "nesterov")),
}  # fmt: skip
"""Optimizer → the settings that it takes beside --learning-rate, --weight-decay and --adam-*."""

ANOTHER_RATE = {
    "lion": "Lion wants a third to a tenth of that (Chen et al., 2023, section 5)",
    "sgd": "SGD wants a far higher one",
    "adagrad": "Adagrad wants a higher one",
    "rmsprop": "RMSprop, whose first steps are larger, wants a lower one",
}
"""How optimizers differ for which the rates of the methods were not measured."""

_WORDS: Mapping[str, tuple[Scalar, ...]] = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "threshold_mode": ("rel", "abs"),
    "centered": (True, False),
    "nesterov": (True, False),
}
"""Settings that are no numbers, and what they may be."""

_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def find_problems(train: Any) -> list[str]:
    """Return what is set of the optimizer or the schedule and would not be read.

    Args:
        train: the `TrainerConfig`.
    """
    schedule, optim = train.lr_scheduler_type, train.optim
    problems = _settings_problems(
        "--lr-scheduler-kwargs", f"--lr-scheduler-type {schedule}", train.lr_scheduler_kwargs,
        SCHEDULES.get(schedule, Settings()),
    )  # fmt: skip
    problems += _settings_problems(
        "--optim-args", f"--optim {optim}", train.optim_args, OPTIMIZERS.get(optim, Settings())
    )
    if train.warmup_steps and schedule in _NO_WARMUP:
        problems.append(
            f"--warmup-steps {train.warmup_steps:g}: --lr-scheduler-type {schedule} has no "
            "warm-up. Use constant_with_warmup, or drop --warmup-steps."
        )
    reads = "adam" in optim or "ademamix" in optim
    for name, usual in _ADAM.items():
        value = getattr(train, name)
        if value != usual and not (reads or ("lion" in optim and name != "adam_epsilon")):
            flag = f"--{name.replace('_', '-')}"
            problems.append(f"{flag} {value:g} is not read by --optim {optim}. Drop it.")
    return problems


def _settings_problems(
    flag: str, owner: str, given: Mapping[str, Scalar], settings: Settings
) -> list[str]:
    problems = []
    if unknown := [name for name in given if name not in settings.names]:
        has = f"It has {listing(settings.names)}." if settings.names else "It has none. Drop it."
        problems.append(f"{flag} {listing(unknown)}: no setting of {owner}. {has}")
    for name, value in given.items():
        words = _WORDS.get(name, ())
        if words and value not in words:
            problems.append(f"{flag} {name}={value}: expected {listing(map(_shown, words))}.")
        elif not words and (isinstance(value, bool | str) or value < 0):
            problems.append(f"{flag} {name}={value}: expected a number, 0 or more.")
    needed = settings.needed
    if needed and sum(name in given for name in needed) != 1:
        several = len(needed) > 1
        problems.append(
            f"{owner} needs {'one of ' * several}{' or '.join(needed)}: {flag} {needed[-1]}="
            f"{'0.1' if 'rate' in needed[-1] else '100'}."
        )
    return problems


def _shown(word: Scalar) -> str:
    return str(word).lower() if isinstance(word, bool) else str(word)


Steps = Positive | Annotated[float, Field(gt=0.0, lt=1.0)]
"""A number of steps, or below 1 their share of the run, as in transformers."""


def _none_for_auto(value: object) -> object:
    """Return None for the word that stands for the default."""
    return None if value == "auto" else value


class TrainerConfig(Decoding):
    """The optimisation; names are those of `transformers.TrainingArguments`."""

    num_train_epochs: float = Field(
        3.0, gt=0, le=10_000, description="How often the training rows are gone through."
    )
    max_steps: Positive | None = Field(
        None, description="Stop after N optimizer steps, whatever the epochs say."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Peak learning rate; the default depends on the method, the model's kind and "
        "width, and the length of the run.",
    )
    head_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Peak learning rate of a new head; the default is learning_rate where that is "
        "given, and else one of its own.",
    )
    lr_scheduler_type: Schedule = Field(
        "linear", description="How the learning rate goes on after its peak."
    )
    lr_scheduler_kwargs: Scalars = Field(
        default_factory=dict,
        description="Settings of that schedule by transformers' names, as in num_cycles=3 or "
        "min_lr_rate=0.1.",
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Steps of warm-up, or below 1 their share of all steps."
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Weight decay; AdamW's is decoupled from the gradient."
    )
    adam_beta1: Share = Field(0.9, description="Decay of AdamW's mean of the gradients.")
    adam_beta2: Share = Field(0.999, description="Decay of AdamW's mean of their squares.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-8, description="What AdamW adds to the root of that mean."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm; 0 is off.")
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="What becomes of a step whose loss or gradient is NaN or infinite: stop, leave "
        "it out (skip), or go back to the newest checkpoint's weights and leave out what came "
        "since (rollback).",
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="Go back to the newest checkpoint's weights where a step's loss is above so "
        "many times the median of the last 20 steps, and leave the step out; the default is never.",
    )
    label_smoothing_factor: Share = Field(
        0.0,
        description="Share of each target's probability that is spread over all others, in "
        "training alone: what is evaluated is the plain loss.",
    )
    class_weights: ClassWeights = None
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="Focal loss: a target's loss is multiplied by (1 - its probability) to this "
        "power (Lin et al., 2017), in training alone; 0 is off.",
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Add noise to the embeddings in training (NEFTune, Jain et al., 2023), which "
        "needs the plain step.",
    )
    optim: Optimizer = Field(
        "adamw_torch_fused", description="Optimizer, by transformers' name, and its default."
    )
    optim_args: Scalars = Field(
        default_factory=dict,
        description="Settings of that optimizer by its own names, as in momentum=0.9.",
    )
    per_device_train_batch_size: Positive = Field(8, description="Rows a device and micro-step.")
    per_device_eval_batch_size: Positive | None = Field(
        None, description="Rows a device in evaluation; the default is the training batch."
    )
    gradient_accumulation_steps: Positive = Field(
        1, description="Micro-steps that make one optimizer step."
    )
    num_processes: Positive | None = Field(
        None,
        description="Processes that train together, each on a device of its own, and each with "
        "per_device_train_batch_size rows; the default is one, or as torchrun started them.",
    )
    shard: Literal["none", "grads", "full"] = Field(
        "none",
        description="Share the model out over the processes by FSDP2, for one that a device does "
        "not hold: full gathers each block as it is computed, forward and backward; grads holds it "
        "from one to the other.",
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        0,
        description="How often the processes are started again, from the newest whole checkpoint, "
        "when one of several fails or is killed.",
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        "random",
        description="Order of the rows in an epoch; group_by_length puts rows of like length into "
        "a step, which saves padding where rows cannot be packed.",
    )
    gradient_checkpointing: Annotated[bool | None, BeforeValidator(_none_for_auto)] = Field(
        None,
        description="Recompute activations in the backward pass: less memory, more time; the "
        "default, auto, recomputes as many blocks as a GPU's memory asks for, and on a CPU none.",
    )
    offload_activations: bool = Field(
        False,
        description="Hold what the recomputed blocks begin with in the host's memory: for long "
        "rows on a GPU. It recomputes all blocks.",
    )
    tf32: bool | None = Field(
        None,
        description="Multiply float32 in TF32 while training on a GPU that has it (Ampere or "
        "later): eight times as fast, with 10 bits of mantissa; the default is to do so.",
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Seed of the weights, the dropout and the data order."
    )
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the order of the rows alone; the default is the other one."
    )
    logging_steps: Steps | None = Field(
        None,
        description="Log every N steps, or below 1 every such share of the run; the default is "
        "about 20 times a run.",
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="Evaluate every eval_steps, at the end of each epoch or not at all: steps, "
        "epoch, no; the default is steps where eval_steps is given, else epoch.",
    )
    eval_steps: Steps | None = Field(
        None,
        description="Evaluate every N steps, or below 1 every such share of the run; the default "
        "is at the end of each epoch.",
    )
    eval_on_start: bool = Field(False, description="Evaluate the untrained model first.")
    load_best_model_at_end: bool | None = Field(
        None,
        description="Keep the model of the best evaluation instead of the last one; the default is "
        "to do so where validation rows are evaluated more than once.",
    )
    metric_for_best_model: str | None = Field(
        None,
        min_length=1,
        description="Metric that says which evaluation is the best, with or without eval_; the "
        "default is the task's first where it is scored on all rows, else loss.",
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether the best metric is the highest; the default is by its name: not of a "
        "loss, a perplexity or an error.",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="Stop after N evaluations in a row without a better one; the default is never.",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="By how much an evaluation has to be better to count as such."
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = Field(
        None,
        description="Write checkpoints every save_steps, at the end of each epoch, at each best "
        "evaluation or never: steps, epoch, best, no; the default is steps where save_steps is "
        "given, else by save_minutes alone, and at the end where it is small (512 MB).",
    )
    save_steps: Steps | None = Field(
        None,
        description="Write a checkpoint every N steps, or below 1 every such share of the run.",
    )
    save_minutes: float = Field(
        10.0,
        ge=0,
        description="Write a checkpoint too when so many minutes went by without one, and then at "
        "the end; 0 for never.",
    )
    save_total_limit: Positive = Field(2, description="How many checkpoints are kept.")
    metrics: FewNames = Field(
        (),
        description="Metrics that an evaluation gives beside the loss, with commas between; the "
        "default is all of the task.",
    )
    predict_with_generate: bool | None = Field(
        None,
        description="Score generated text (ROUGE) in evaluation; the default is by the task.",
    )
    max_generate_samples: Positive = Field(
        32, description="How many validation rows are generated for scoring."
    )
    max_new_tokens: Positive = Field(64, description="Longest generated text in tokens.")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def recomputes(self) -> bool:
        """Whether all blocks are recomputed, whatever fits."""
        return self.gradient_checkpointing is True or self.offload_activations

    def may_recompute(self, device: str) -> bool:
        """Whether blocks are recomputed on `device`, or may turn out to be."""
        return self.recomputes or (self.gradient_checkpointing is None and device == "cuda")
