"""`plan`: estimate memory, time and cost of a run without loading the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.errors import ConfigError, FtlevelError, excludes, needs
from ftlevel.models.loading import silence_loggers
from ftlevel.models.sources import resolve_source
from ftlevel.training.forecast.fits import (
    Device,
    MemoryRequirement,
    estimate_requirement,
    fit_run,
    is_sized_by_memory,
)
from ftlevel.training.forecast.meta_model import (
    OPTIMIZER,
)
from ftlevel.training.forecast.seconds import (
    TimeForecast,
    estimate_time,
    measure_time,
    parse_gpu,
)
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import SyntheticBatch, infer_task, resolve
from ftlevel.training.plan.run import PlannedModel, Run, count_trainable
from ftlevel.training.saving import max_num_checkpoints

_DEFAULT_METHODS = (("lora", "none"), ("qlora", "4bit"), ("full", "none"))
_MIN_LENGTH = 64  # tokens; the cheapest change has no shorter rows


@dataclass(frozen=True)
class Alternative:
    """Alternative settings of a run, the bytes at the peak, and whether these fit in memory."""

    flags: str
    peak: int
    fits: bool


class _Settings(NamedTuple):
    """Settings of an alternative; `setup` is (method, quantization), `length` None is the run's."""

    setup: tuple[str, str]
    checkpointing: bool
    batch_size: int
    length: int | None = None

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Returns `config` with these settings; ConfigError or ValidationError if invalid."""
        (method, quant), values = self.setup, config.model_dump(exclude_unset=True)
        changes: dict[str, dict[str, Any]] = {
            "train": {
                "gradient_checkpointing": self.checkpointing,
                "per_device_train_batch_size": self.batch_size,
                # With accumulation, gradients exist in the forward pass.
                "gradient_accumulation_steps": max(2, config.train.gradient_accumulation_steps),
            },
            "data": {} if self.length is None else {"max_length": self.length},
        }
        if self.setup != _get_setup(config):
            changes["quant"] = {"kind": quant}
        if method != config.method.kind:
            values["method"] = {"kind": method}
        sections = {name: {**values.get(name, {}), **changes[name]} for name in changes}
        return TrainConfig.model_validate({**values, **sections})

    def flags(self, train: TrainerConfig) -> str:
        """Returns the flags of these settings for a run of `train`."""
        method, quant = self.setup
        words = [f"--method {method}"]
        if quant != "none" and self.setup not in _DEFAULT_METHODS:
            words.append(f"--quant {quant}")
        words.append(f"--{'no-' * (not self.checkpointing)}gradient-checkpointing")
        words.append(f"--per-device-train-batch-size {self.batch_size}")
        if self.batch_size < (size := train.per_device_train_batch_size):
            count = train.gradient_accumulation_steps * -(-size // self.batch_size)
            words.append(f"--gradient-accumulation-steps {count}")
        if self.length is not None:
            words.append(f"--max-length {self.length}")
        return " ".join(words)


def _get_setup(config: TrainConfig) -> tuple[str, str]:
    return config.method.kind, config.quant.kind


@dataclass(frozen=True)
class Alternatives:
    """Estimates of a run with other settings.

    `card` names a GPU that this machine lacks; None for this machine. `cache` (modified) has the
    estimates so far. `check` is called before each estimate and may raise.
    """

    config: TrainConfig
    device: Device
    card: str | None
    model: PlannedModel
    cache: dict[_Settings, Alternative | None] = field(default_factory=dict)
    check: Callable[[], object] = bool

    def estimate_all(self) -> list[Alternative]:
        """Returns estimates for the run's method, LoRA, QLoRA and full, ± checkpointing.

        The last two are for the run's method with half and with twice the maximum length.
        """
        current, train = _get_setup(self.config), self.config.train
        own = ("qlora", "4bit") if current == ("lora", "4bit") else current
        setups = [current, *(setup for setup in _DEFAULT_METHODS if setup != own)]
        rows, length = train.per_device_train_batch_size, self.config.data.max_length
        candidates = [_Settings(setup, ckpt, rows) for setup in setups for ckpt in (False, True)]
        if isinstance(length, int):
            lengths = length // 2, length * 2
            candidates += [_Settings(current, train.recomputes, rows, other) for other in lengths]
        return [fit for settings in candidates if (fit := self._estimate(settings))]

    def get_cheapest(self) -> Alternative | None:
        """Returns the least costly change with which the run fits in memory; None if none does.

        In this order: fewer rows per micro-batch, checkpointing (a third of the speed is lost),
        4-bit weights (less precise), shorter rows (lost data).
        """
        current, train = _get_setup(self.config), self.config.train
        size, length = train.per_device_train_batch_size, self.config.data.max_length
        in_4bit = ("qlora" if current[0] == "lora" else current[0], "4bit")
        in_4bit = current if current[1] == "4bit" else in_4bit
        candidates: list[_Settings] = []
        for setup in dict.fromkeys((current, in_4bit)):
            least = self._estimate(_Settings(setup, True, 1))
            if least and least.fits:
                candidates += [
                    _Settings(setup, checkpointing, rows)
                    for checkpointing in (train.recomputes, True)
                    for rows in (size, max(1, size // 2), 1)
                ]
        if isinstance(length, int):
            lengths = (length // part for part in (2, 4, 8))
            candidates += [_Settings(in_4bit, True, 1, n) for n in lengths if n >= _MIN_LENGTH]
        fits = (self._estimate(settings) for settings in candidates)
        return next((fit for fit in fits if fit and fit.fits), None)

    def _estimate(self, settings: _Settings) -> Alternative | None:
        self.check()
        if settings not in self.cache:
            self.cache[settings] = self._compute(settings)
        return self.cache[settings]

    def _compute(self, settings: _Settings) -> Alternative | None:
        try:
            config = settings.apply(self.config)
            rows = config.train.rows_per_device_step
            source, tokenizer = self.model.source, self.model.tokenizer
            synthetic = SyntheticBatch.of(source, self.card, rows, tokenizer)
            peak = self.device.forecast(resolve(config, synthetic=synthetic)).peak
        except (FtlevelError, ValidationError):  # not supported, or a row is too long
            return None
        return Alternative(settings.flags(self.config.train), peak, peak <= self.device.memory)


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
        checkpoint_bytes: size of one checkpoint, and of all kept at once.
        time: time per epoch; None if unknown, as for several GPUs.
        cost: cost of the run, in the currency of the price.
        cheapest: smallest change with which the run fits; None if it fits, or nothing helps.
    """

    run: Run
    is_synthetic: bool
    need: MemoryRequirement
    checkpoint_bytes: tuple[int, int]
    time: TimeForecast | None
    cost: float | None
    cheapest: Alternative | None
    fits: Sequence[Alternative] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the output of `--json`."""
        need, run, (first, kept) = self.need, self.run, self.checkpoint_bytes
        tokens = None if self.is_synthetic else int(run.data.info["tokens"])
        return {
            **need.to_dict(),
            "recomputed_peak_bytes": need.recomputed_peak,
            "device": need.device.name,
            "imagined_rows": self.is_synthetic,
            "fits": [
                {"flags": fit.flags, "peak_bytes": fit.peak, "fits": fit.fits} for fit in self.fits
            ],
            "cheapest_change": self.cheapest.flags if self.cheapest else None,
            "steps_per_epoch": None if self.is_synthetic else run.schedule.steps_per_epoch,
            "tokens_per_epoch": tokens,
            "seconds_per_epoch": self.time.seconds_per_epoch if self.time else None,
            "time": asdict(self.time) if self.time else None,
            "cost": self.cost,
            "checkpoint_bytes": first,
            "checkpoints_bytes": kept,
            "choices": [
                {"name": c.name, "value": str(c.value), "reason": c.reason} for c in run.choices
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
        result, alternatives = _plan(config, options)
        show(result)
        if not options.alternatives:
            return result
        return replace(result, fits=replace(alternatives, check=check).estimate_all())


def _plan(config: TrainConfig, options: PlanOptions) -> tuple[RunPlan, Alternatives]:
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
    card = gpu.name if gpu else None
    synthetic = SyntheticBatch.of(source, card, rows)
    run = resolve(config, why_task=message, adapter=adapter, synthetic=synthetic)
    device = Device.of(run.model.device, gpu, ranks)
    if is_sized_by_memory(run):  # `need` has the peaks with and without checkpointing
        run = replace(fit_run(run, device), recomputes=False).apply(run)
    need = estimate_requirement(run, device)
    length = {} if is_synthetic else {"max_length": run.data.max_length}
    as_long = _replace(config, "data", **length)
    alternatives = Alternatives(as_long, device, card, run.model)
    time = measure_time(run) if options.probe else None
    if gpu and ranks == 1 and not is_synthetic:
        time = estimate_time(run, gpu)
    cost: float | None = None
    if (price := options.price_per_hour) is not None:
        if time is None:
            fix = "Add --dataset FILE with --probe or the --gpu NAME of one GPU, or drop it."
            raise ConfigError(
                needs(f"--price-per-hour {price:g}", "an estimate of the time", fix=fix)
            )
        train, steps = config.train, run.schedule.steps_per_epoch
        epochs = train.max_steps / steps if train.max_steps else train.num_train_epochs
        cost = time.seconds_per_epoch * epochs / 3600 * price
    cheapest = None if need.does_fit else alternatives.get_cheapest()
    disk = _checkpoints(run, need.parts)
    return RunPlan(run, is_synthetic, need, disk, time, cost, cheapest), alternatives


def _replace(config: TrainConfig, section: str, **fields: Any) -> TrainConfig:
    values = getattr(config, section).model_copy(update=fields)
    return config.model_copy(update={section: values})


def _checkpoints(run: Run, parts: Mapping[str, int]) -> tuple[int, int]:
    trained, _ = count_trainable(run)
    one, train = 4 * trained + parts.get(OPTIMIZER, 0), run.config.train
    is_by_time = train.save_strategy is None and train.save_steps is None
    limit = train.save_total_limit
    count = limit if is_by_time else max_num_checkpoints(train, run.schedule.steps)
    return one, one * min(count, limit)
