"""Alternatives to the settings of a run, and the memory that they need.

    most rows = (memory − fixed) / (activations and workspace per row)

The formula is for rows of maximum length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.models.sources import ModelSource
from ftlevel.training.forecast.fits import ALLOCATOR, Device
from ftlevel.training.forecast.memory import StepMemory
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    FIRST_BLOCK,
    FORWARD,
    OPTIMIZER,
    QUANTIZED,
    WEIGHTS,
    WORKSPACE,
    create_synthetic_batch,
)
from ftlevel.training.plan.resolve import resolve

_MAX_ROWS = 4096
_DEFAULT_METHODS: tuple[tuple[str, str], ...] = (
    ("lora", "none"),
    ("qlora", "4bit"),
    ("full", "none"),
)


@dataclass(frozen=True)
class Alternative:
    """Alternative settings of a run, and the memory that they need.

    Attributes:
        peak: bytes at the peak with the micro-batch size in `flags`.
        fits: whether `peak` is within the memory.
        most_rows: largest micro-batch that fits, in rows; 0 if none does, None on a CPU, where
            memory does not depend on it.
        least: bytes needed regardless of the number and length of rows.
    """

    flags: str
    peak: int
    fits: bool
    most_rows: int | None
    least: int


class _Settings(NamedTuple):
    """Settings of an alternative; `setup` is (method, quantization), `length` None is the run's."""

    setup: tuple[str, str]
    checkpointing: bool
    batch_size: int
    length: int | None = None


@dataclass(frozen=True)
class AlternativeContext:
    """A run's configuration, device and model, for which alternative settings are estimated.

    `card` names a GPU that this machine lacks; None for this machine. `cache` (modified) has the
    estimates so far. `check` is called before each estimate and may raise.
    """

    config: TrainConfig
    device: Device
    card: str | None
    source: ModelSource
    tokenizer: Any
    cache: dict[_Settings, Alternative | None] = field(default_factory=dict)
    check: Callable[[], object] = bool


def list_alternatives(context: AlternativeContext) -> list[Alternative]:
    """Returns estimates for the run's method, LoRA, QLoRA and full, with and without checkpointing.

    The last two are for the run's method with half and with twice the maximum length.
    """
    config = context.config
    current = config.method.kind, config.quant.kind
    other_setups = (setup for setup in _DEFAULT_METHODS if setup != _name_setup(current))
    setups = [current, *other_setups]
    batch_size = config.train.per_device_train_batch_size
    alternatives = [
        _get_alternative(_Settings(setup, ckpt, batch_size), context)
        for setup, ckpt in itertools.product(setups, (False, True))
    ]
    length = config.data.max_length
    if isinstance(length, int):
        for other in (length // 2, length * 2):
            settings = _Settings(current, config.train.recomputes, batch_size, other)
            alternatives.append(_get_alternative(settings, context))
    return [fit for fit in alternatives if fit is not None]


def _name_setup(setup: tuple[str, str]) -> tuple[str, str]:
    return ("qlora", "4bit") if setup == ("lora", "4bit") else setup


def get_cheapest(context: AlternativeContext) -> Alternative | None:
    """Returns the least costly change with which the run fits in memory; None if none does.

    In this order: fewer rows per micro-batch, checkpointing (a third of the speed is lost), 4-bit
    weights (less precise), shorter rows (lost data).
    """
    config = context.config
    train, current = config.train, (config.method.kind, config.quant.kind)
    batch_size, ckpt = train.per_device_train_batch_size, train.recomputes
    setup_4bit = current if current[1] == "4bit" else _name_setup((current[0], "4bit"))
    length = config.data.max_length
    candidates = [
        _Settings(setup, checkpointing, micro_batch)
        for setup in (current, setup_4bit)
        for checkpointing in (ckpt, True)
        for micro_batch in (batch_size, max(1, batch_size // 2), 1)
    ]
    if isinstance(length, int):
        candidates += [
            _Settings(setup_4bit, True, 1, length // part)
            for part in (2, 4, 8)
            if length // part >= 64
        ]
    rejected = set()
    for settings in dict.fromkeys(candidates):
        if settings.setup in rejected:
            continue
        fit = _get_alternative(settings, context)
        if fit is not None and fit.fits:
            return fit
        if fit is not None and fit.least > context.device.memory:
            rejected.add(settings.setup)
    return None


def _get_alternative(settings: _Settings, context: AlternativeContext) -> Alternative | None:
    context.check()
    if settings not in context.cache:
        context.cache[settings] = _compute(settings, context)
    return context.cache[settings]


def _compute(settings: _Settings, context: AlternativeContext) -> Alternative | None:
    config = _build_config(settings, context.config)
    if config is None:
        return None
    num_rows = config.train.rows_per_device_step
    synthetic = create_synthetic_batch(
        config.data, context.source, context.card, num_rows, context.tokenizer
    )
    try:
        forecast = context.device.forecast(resolve(config, synthetic=synthetic))
    except FtlevelError:  # method and model do not match, or the row is too long
        return None
    memory, max_rows = context.device.memory, None
    if context.device.kind != "cpu":  # a CPU computes micro-batches of fixed size in turn
        max_rows = get_max_rows(forecast, memory, settings.batch_size)
    minimum = sum(forecast.parts.get(part, 0) for part in (WEIGHTS, QUANTIZED, ADAPTER, OPTIMIZER))
    options = " ".join(_format_options(context.config.train, settings))
    return Alternative(options, forecast.peak, forecast.peak <= memory, max_rows, minimum)


def get_max_rows(forecast: StepMemory, memory: int, batch_size: int) -> int:
    """Returns the most rows that fit in `memory` bytes, by a `forecast` for `batch_size` rows."""
    limits = [_MAX_ROWS]
    for moment, parts in forecast.moments.items():
        available = memory - forecast.parts.get(ALLOCATOR, 0) - sum(parts.values())
        per_batch = sum(parts.get(part, 0) for part in (ACTIVATIONS, WORKSPACE))
        if moment in (FORWARD, BACKWARD, FIRST_BLOCK) and per_batch:
            limits.append(batch_size + int(available // (per_batch / batch_size)))
        elif available < 0:  # whatever the rows
            limits.append(0)
    return max(0, min(limits))


def _build_config(settings: _Settings, config: TrainConfig) -> TrainConfig | None:
    method, quant = settings.setup
    accumulation_steps = max(2, config.train.gradient_accumulation_steps)  # gradients exist
    changes: dict[str, dict[str, Any]] = {
        "train": {
            "gradient_checkpointing": settings.checkpointing,
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": accumulation_steps,
        }
    }
    if settings.length is not None:
        changes["data"] = {"max_length": settings.length}
    values: dict[str, Any] = config.model_dump(exclude_unset=True)
    if settings.setup != (config.method.kind, config.quant.kind):
        changes["quant"] = {"kind": quant}
        if method != config.method.kind:
            values["method"] = {"kind": method}
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    try:
        return TrainConfig.model_validate(values)
    except (ConfigError, ValueError):
        return None


def _format_options(train: TrainerConfig, settings: _Settings) -> Iterator[str]:
    (method, quant), checkpointing, batch_size, length = settings
    yield f"--method {method}"
    if quant != "none" and method != "qlora":
        yield f"--quant {quant}"
    yield "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"
    default_size = train.per_device_train_batch_size
    yield f"--per-device-train-batch-size {batch_size}"
    if batch_size < default_size:
        accumulation_steps = train.gradient_accumulation_steps * -(-default_size // batch_size)
        yield f"--gradient-accumulation-steps {accumulation_steps}"
    if length is not None:
        yield f"--max-length {length}"
