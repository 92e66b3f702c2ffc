"""Which optimizers and schedules there are, and what may be set of each; names as transformers'.

A name or a setting that transformers would not read is refused: it drops most of these in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ftlevel.config.options.pairs import Scalar
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
