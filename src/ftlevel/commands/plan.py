"""`plan`: estimate memory, time and cost of a run without loading the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, FtlevelError, excludes, needs
from ftlevel.models.loading import silence_loggers
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.training.forecast.fits import (
    ALLOCATOR,
    Device,
    MemoryRequirement,
    estimate_requirement,
    fit_run,
    is_sized_by_memory,
)
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
from ftlevel.training.forecast.seconds import (
    TimeForecast,
    estimate_time,
    measure_time,
    parse_gpu,
)
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import infer_task, resolve
from ftlevel.training.plan.run import Run, count_trainable
from ftlevel.training.saving import max_num_checkpoints

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


_SYNTHETIC_STEPS = 2


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan besides the run configuration.

    `gpu` is a name or a memory size, None for this machine's device; `probe` runs a few real steps.
    """

    gpu: str | None = None
    probe: bool = False
    price_per_hour: float | None = None
    alternatives: bool = True


@dataclass(frozen=True)
class RunPlan:
    """Estimated memory, time and cost of a run.

    Attributes:
        steps: optimizer steps per epoch.
        tokens: tokens per epoch; 0 with synthetic rows.
        max_length: row length in tokens for which the alternatives in `fits` are estimated.
        checkpoint_bytes: size of one checkpoint, and of all kept at once.
        time: time per epoch; None if unknown, as for several GPUs.
        cost: cost of the run, in the currency of the price.
        cheapest: smallest change with which the run fits; None if it fits, or nothing helps.
    """

    need: MemoryRequirement
    steps: int
    tokens: int
    is_synthetic: bool
    max_length: int
    checkpoint_bytes: tuple[int, int]
    time: TimeForecast | None
    cost: float | None
    fits: list[Alternative]
    cheapest: Alternative | None
    choices: list[Choice]

    def to_dict(self) -> dict[str, Any]:
        """Returns the output of `--json`."""
        first, kept = self.checkpoint_bytes
        need = self.need
        return {
            "peak_bytes": need.peak,
            "process_bytes": need.process,
            "parts": need.parts,
            "at": need.at,
            "memory_bytes": need.device.memory,
            "fits_in_memory": need.does_fit,
            "recomputed_peak_bytes": need.recomputed_peak,
            "device": need.device.name,
            "imagined_rows": self.is_synthetic,
            "fits": [
                {"flags": f.flags, "peak_bytes": f.peak, "fits": f.fits, "most_rows": f.most_rows}
                for f in self.fits
            ],
            "cheapest_change": self.cheapest.flags if self.cheapest else None,
            "steps_per_epoch": None if self.is_synthetic else self.steps,
            "tokens_per_epoch": self.tokens or None,
            "seconds_per_epoch": self.time.seconds_per_epoch if self.time else None,
            "time": asdict(self.time) if self.time else None,
            "cost": self.cost,
            "checkpoint_bytes": first,
            "checkpoints_bytes": kept,
            "choices": [
                {"name": c.name, "value": str(c.value), "reason": c.reason} for c in self.choices
            ],
        }


def plan(
    config: TrainConfig,
    options: PlanOptions = PlanOptions(),
    show: Callable[[RunPlan], object] = lambda _: None,
    check: Callable[[], object] = lambda: None,
) -> RunPlan:
    """Estimate what the run of `config` needs, without loading weights.

    With a model but no dataset, rows of maximum length are synthesized. `show` is called with the
    plan before alternatives are computed; `check` is called before each alternative and may raise
    to stop. Raises ConfigError if the run could not start, the GPU is unknown, or the step cannot
    run on meta tensors.
    """
    with silence_loggers():
        result, limits = _plan(config, options)
        show(result)
        if not options.alternatives:
            return result
        return replace(result, fits=list_alternatives(replace(limits, check=check)))


def _plan(config: TrainConfig, options: PlanOptions) -> tuple[RunPlan, AlternativeContext]:
    gpu = parse_gpu(options.gpu) if options.gpu else None
    if gpu and options.probe:
        reason = "one runs steps on this machine, the other plans for another GPU"
        raise ConfigError(excludes("--probe", "--gpu", reason))
    ranks = (config.train.num_processes or 1) if gpu else 1
    if ranks == 1 and config.train.shard != "none":
        raise ConfigError(
            f"--shard {config.train.shard} shards a model across GPUs. Add --num-processes N, the "
            "number of all GPUs, and --gpu NAME."
        )
    config, adapter, _ = resolve_adapter(config)
    names_model = "name_or_path" in config.model.model_fields_set
    is_synthetic = names_model and "dataset" not in config.data.model_fields_set
    if is_synthetic and options.probe:
        raise ConfigError("--probe runs steps on real rows. Name them: --dataset FILE.")
    config, message = (config, "") if is_synthetic else infer_task(config)
    if gpu and config.model.dtype == "auto":
        config = _replace(config, "model", dtype="float16" if gpu.name == "T4" else "bfloat16")
    model = config.model
    source = resolve_source(
        model.name_or_path, model.revision, model.trust_remote_code, require_weights=options.probe
    )
    rows = config.train.rows_per_device_step * _SYNTHETIC_STEPS if is_synthetic else 0
    synthetic = create_synthetic_batch(config.data, source, gpu.name if gpu else None, rows)
    run = resolve(config, why_task=message, adapter=adapter, synthetic=synthetic)
    device = Device.of(run.model.device, gpu, ranks)
    if is_sized_by_memory(run):  # `need` has the peaks with and without checkpointing
        run = replace(fit_run(run, device), recomputes=False).apply(run)
    need = estimate_requirement(run, device)
    length = run.data.max_length
    as_long = config if is_synthetic else _replace(config, "data", max_length=length)
    limits = AlternativeContext(
        as_long, need.device, gpu.name if gpu else None, source, run.model.tokenizer
    )
    time: TimeForecast | None = None
    if options.probe:
        time = measure_time(run)
    elif gpu and ranks == 1 and not is_synthetic:
        time = estimate_time(run, gpu)
    if time is None and options.price_per_hour is not None:
        flag = f"--price-per-hour {options.price_per_hour:g}"
        fix = "Add --dataset FILE with --probe or the --gpu NAME of one GPU, or drop it."
        raise ConfigError(needs(flag, "an estimate of the time", fix=fix))
    steps = run.schedule.steps_per_epoch
    result = RunPlan(
        need=need,
        steps=steps,
        tokens=0 if is_synthetic else int(run.data.info["tokens"]),
        is_synthetic=is_synthetic,
        max_length=run.data.max_length,
        checkpoint_bytes=_checkpoints(run, need.parts),
        time=time,
        cost=_cost(config, time, steps, options.price_per_hour),
        fits=[],
        cheapest=get_cheapest(limits) if not need.does_fit else None,
        choices=run.choices,
    )
    return result, limits


def _replace(config: TrainConfig, section: str, **fields: Any) -> TrainConfig:
    values = getattr(config, section).model_copy(update=fields)
    return config.model_copy(update={section: values})


def _cost(
    config: TrainConfig, time: TimeForecast | None, steps: int, price_per_hour: float | None
) -> float | None:
    if price_per_hour is None or time is None:
        return None
    train = config.train
    epochs = train.max_steps / steps if train.max_steps else train.num_train_epochs
    return time.seconds_per_epoch * epochs / 3600 * price_per_hour


def _checkpoints(run: Run, parts: Mapping[str, int]) -> tuple[int, int]:
    trained, _ = count_trainable(run)
    one, train = 4 * trained + parts.get(OPTIMIZER, 0), run.config.train
    is_by_time = train.save_strategy is None and train.save_steps is None
    limit = train.save_total_limit
    count = limit if is_by_time else max_num_checkpoints(train, run.schedule.steps)
    return one, one * min(count, limit)
