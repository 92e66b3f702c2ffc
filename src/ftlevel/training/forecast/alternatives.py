"""Settings that fit in memory: the size of micro-batches, and alternatives to the run's settings.

    T' = ⌊T · (M − fixed) / moving⌋
    most rows = (memory − fixed) / (activations and workspace per row)

A micro-batch of T tokens needs `fixed` bytes plus `moving` bytes, which grow with T; T' fit in M
bytes. Attention's memory grows faster than T, so T' is corrected until it fits. The size changes
only the summation order in a step. The second formula is for rows of maximum length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import psutil

from ftlevel.config import SpeedConfig, TrainConfig, TrainerConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.store import row_lengths
from ftlevel.errors import ConfigError, FtlevelError, excludes, needs
from ftlevel.fast.plan import MIN_TOKENS
from ftlevel.models.hardware import free_memory_bytes
from ftlevel.models.sources import ModelSource
from ftlevel.training.forecast.fits import ALLOCATOR, MEMORY_RATIO, Device
from ftlevel.training.forecast.memory import StepMemory
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    FIRST_BLOCK,
    FORWARD,
    LOGITS,
    OPTIMIZER,
    QUANTIZED,
    WEIGHTS,
    WORKSPACE,
    create_synthetic_batch,
)
from ftlevel.training.memory import get_quant_flags
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

_VARIABLE_PARTS = (ACTIVATIONS, LOGITS, WORKSPACE)

CPU_OVERHEAD_BYTES = 600 * 2**20
"""Resident bytes of a CPU run that are neither tensors nor there before the model: kernel code,
heap fragmentation, libraries. The runs in docs/plan.md need 350 to 500 MiB."""

MAX_GPU_TOKENS = 16_384
"""Maximum tokens per micro-batch by default on a GPU; more are no faster."""

_SAFETY_FACTOR = 0.98
"""Factor on the linear estimate, so that the next estimate is below the memory."""

_MAX_ATTEMPTS = 6


def select_batch_size(run: Run, processes: Processes, previous_tokens: int | None) -> Run:
    """Returns the run with the largest micro-batch that fits, the same in all processes.

    `previous_tokens` is the micro-batch size of a resumed run. Raises as `fit_batch_size` does.
    """
    if previous_tokens is not None:
        choice = Choice("micro-batch", f"{previous_tokens:,} tokens", "as the run was begun")
        return _with_tokens(run, previous_tokens, 0, choice)

    def select_tokens() -> tuple[int, int, Choice | None]:
        run_that_fits = fit_batch_size(
            run, get_available_memory(run.config.speed, run.model.device, processes)
        )
        fast = run_that_fits.fast
        return fast.tokens, fast.memory, fast.choices[-1] if fast.memory else None

    return _with_tokens(run, *processes.from_first(select_tokens))


def get_available_memory(speed: SpeedConfig, device: str, processes: Processes) -> int:
    """Returns the bytes that this process may still allocate for tensors.

    By default, a GPU keeps a share for what is not in the estimate (`MEMORY_RATIO`).
    """
    limit = speed.memory_gib
    free = free_memory_bytes(device)
    if device != "cpu":
        if speed.tokens_per_micro_batch == "auto":
            free = int(MEMORY_RATIO * free)
        return free if limit is None else min(free, int(limit * 2**30))
    if limit is not None:
        free = min(free, int(limit * 2**30) - psutil.Process().memory_info().rss)
    else:
        free //= processes.world.local_size
    return free - CPU_OVERHEAD_BYTES


def is_sized_by_memory(run: Run) -> bool:
    """Returns whether the micro-batches of `run` are as large as fits: the default on a GPU."""
    setting, can_fit = run.config.speed.tokens_per_micro_batch, run.config.train.shard == "none"
    is_default = setting == "auto" and run.model.device == "cuda" and run.fast.enabled and can_fit
    return setting == "memory" or is_default


def fit_batch_size(run: Run, memory: int) -> Run:
    """Returns the run with the largest micro-batch, in tokens, that fits in `memory` bytes.

    By default, that is at most `MAX_GPU_TOKENS` or the longest row; if that row does not fit, the
    run is unchanged. On a GPU, this may also turn on gradient checkpointing that is set to auto.
    Raises ConfigError if --auto-micro-batch is used and the model is sharded, the fast step is off,
    or a single row does not fit.
    """
    if run.config.train.shard != "none":
        fix = "Drop one of them, or set --tokens-per-micro-batch N."
        raise ConfigError(excludes("--auto-micro-batch", "--shard", fix=fix))
    if not run.fast.enabled:
        fix = "Drop it, or the flag that turns it off (--no-fast, --neftune-noise-alpha)."
        raise ConfigError(needs("--auto-micro-batch", "the fast step", fix=fix))
    best, default_tokens = _search_tokens(run, memory), run.fast.tokens
    is_small = best.tokens < min(MIN_TOKENS, default_tokens)
    train, device = run.config.train, run.model.device
    if is_small and not train.recomputes and train.may_recompute(device):
        checkpointed = _search_tokens(
            run.with_settings("train", gradient_checkpointing=True), memory
        )
        best = checkpointed if checkpointed.tokens > best.tokens else best
    is_default = run.config.speed.tokens_per_micro_batch == "auto"
    if not best.tokens and is_default:
        return run  # a step that runs out of memory halves its micro-batches
    if not best.tokens:
        raise ConfigError(_too_large_message(run, best.peak, memory))
    peak, available = (f"{size / 2**30:.2f} GiB" for size in (best.peak, memory))
    name = "auto" if is_default else "--auto-micro-batch"
    message = f"{name}: {peak} at the peak of a step, of {available}"
    choice = Choice("micro-batch", f"{best.tokens:,} tokens", message)
    return _with_tokens(run, best.tokens, memory, choice)


class _FitResult(NamedTuple):
    """Most `tokens` per micro-batch that fit in memory (0: none); `peak` of the last estimate."""

    tokens: int
    peak: int


def _search_tokens(run: Run, memory: int) -> _FitResult:
    tokens, max_row_tokens = _max_tokens_to_try(run), int(row_lengths(run.data.train).max())
    device = Device(run.model.device, run.model.device, memory)
    for _ in range(_MAX_ATTEMPTS):
        forecast = device.forecast(_with_tokens(run, tokens, memory))
        peak = forecast.peak
        if peak <= memory:
            return _FitResult(tokens, peak)
        if forecast.tokens <= max_row_tokens:  # a row alone
            break
        tokens = _shrink(forecast, min(tokens, forecast.tokens * run.fast.workers), peak, memory)
        if tokens < 1:
            break
    return _FitResult(0, peak)


def _shrink(forecast: StepMemory, tokens: int, peak: int, memory: int) -> int:
    """Returns fewer tokens per micro-batch to try, as `tokens` need `peak` bytes; 0 if none fit."""
    variable = sum(forecast.parts.get(part, 0) for part in _VARIABLE_PARTS)
    available = memory - (peak - variable)
    return (
        min(tokens - 1, int(_SAFETY_FACTOR * tokens * available / variable))
        if available > 0 and variable
        else 0
    )


def _max_tokens_to_try(run: Run) -> int:
    if run.model.device == "cpu":
        return run.fast.tokens
    tokens = max(run.fast.tokens, run.config.train.rows_per_device_step * run.data.max_length)
    if run.config.speed.tokens_per_micro_batch == "auto":
        tokens = min(tokens, max(MAX_GPU_TOKENS, int(row_lengths(run.data.train).max())))
    return tokens


def _too_large_message(run: Run, peak: int, memory: int) -> str:
    suggestions = [] if run.config.train.recomputes else ["--gradient-checkpointing"]
    suggestions += ["a smaller --max-length", "--set speed.parallel_workers=1"][: run.fast.workers]
    suggestions += get_quant_flags(run)
    return (
        f"--auto-micro-batch: micro-batches of one row need {peak / 2**30:.2f} GiB, and "
        f"{max(0, memory) / 2**30:.2f} GiB of the device {run.model.device} are left for tensors. "
        f"Try {', '.join(suggestions)}; ftlevel plan says what fits."
    )


def _with_tokens(run: Run, tokens: int, memory: int, choice: Choice | None = None) -> Run:
    new_run = run.with_settings("speed", tokens_per_micro_batch=tokens, memory_gib=None)
    choices = [] if choice is None else [choice]
    fast = replace(run.fast, tokens=tokens, memory=memory, choices=[*run.fast.choices, *choices])
    return replace(new_run, fast=fast, choices=[*run.choices, *choices])


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
