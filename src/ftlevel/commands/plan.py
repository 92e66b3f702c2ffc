"""`plan`: estimate memory, time and cost of a run without loading the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, excludes, needs
from ftlevel.models.loading import silence_loggers
from ftlevel.models.sources import resolve_source
from ftlevel.training.forecast.alternatives import (
    Alternative,
    AlternativeContext,
    get_cheapest,
    list_alternatives,
)
from ftlevel.training.forecast.fits import Device, MemoryRequirement, estimate_requirement, fit_run
from ftlevel.training.forecast.meta_model import OPTIMIZER, create_synthetic_batch
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
    run = replace(fit_run(run, device), recomputes=False).apply(run)  # `need` has both peaks
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
