"""Plan: resolve → run the step on tensors without numbers → say what it needs and what fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.models.hardware import describe_device
from ftlevel.models.loading import quiet_libraries
from ftlevel.models.memory import device_memory
from ftlevel.models.quantized import as_quant_config, quantization_name, stored_quantization
from ftlevel.models.sources import resolve_source
from ftlevel.training.forecast.cards import Card, read_card
from ftlevel.training.forecast.fits import Fit, Limits, find_cheapest, list_fits
from ftlevel.training.forecast.imagined import imagine
from ftlevel.training.forecast.live import (
    ACTIVATIONS,
    ADAPTER,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    WORKSPACE,
)
from ftlevel.training.forecast.memory import MemoryForecast, forecast_memory
from ftlevel.training.forecast.seconds import (
    TimeForecast,
    by_probe,
    by_roofline,
    steps_per_epoch,
)
from ftlevel.training.plan.adapter import take_adapter
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.plan.task_choice import choose_task
from ftlevel.training.plan.trainable import count_trainable

ALLOCATOR = "allocator and context"

CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""What a CUDA context takes, and the share of what comes and goes that torch's allocator has to
spare: an allowance, since no card was at hand to measure either."""

_COMES_AND_GOES = (ACTIVATIONS, LOGITS, WORKSPACE, GRADIENTS)
_IMAGINED_STEPS = 2


@dataclass(frozen=True)
class Wishes:
    """What is asked of a plan beside the run.

    Attributes:
        gpu: a card by its name or its memory; None for this machine's device.
        probe: whether to run some real steps.
        price_per_hour: of the machine; None to say nothing of cost.
        alternatives: whether to compute what else fits.
    """

    gpu: str | None = None
    probe: bool = False
    price_per_hour: float | None = None
    alternatives: bool = True


@dataclass(frozen=True)
class RunPlan:
    """What a run needs.

    Attributes:
        peak: bytes of memory at the peak.
        parts: part → bytes at the peak.
        at: the moment of the peak.
        memory: bytes that there are.
        device: what is planned for, in words.
        steps: optimizer steps of an epoch; of the run where rows are streamed.
        tokens: of an epoch; 0 where rows are imagined.
        imagined: whether the rows are.
        checkpoint_bytes: of one checkpoint, and of all that are kept at once.
        time: how long an epoch takes; None where nothing says.
        cost: of the run, in the currency of the price.
        fits: what else fits.
        cheapest: the mildest change that makes the run fit; None where it fits, or nothing does.
        several: cards → kind → bytes on each.
        choices: lines for the screen.
        recomputed_peak: of a run that will recompute blocks until it fits, with all of them; None
            of another, and of one that fits as it is.
    """

    peak: int
    parts: dict[str, int]
    at: str
    memory: int
    device: str
    steps: int
    tokens: int
    imagined: bool
    checkpoint_bytes: tuple[int, int]
    time: TimeForecast | None
    cost: float | None
    fits: list[Fit]
    cheapest: Fit | None
    several: dict[int, dict[str, int]]
    choices: list[Choice] = field(default_factory=list)
    recomputed_peak: int | None = None

    @property
    def does_fit(self) -> bool:
        """Whether there is as much memory, with blocks recomputed where the run does so itself."""
        return min(self.peak, self.recomputed_peak or self.peak) <= self.memory

    def verdict(self) -> str:
        """Return the plan in a line."""
        peak, memory = (f"{size / 2**30:,.2f} GiB" for size in (self.peak, self.memory))
        word = "fits" if self.does_fit else "does not fit"
        if self.recomputed_peak is not None:
            least = f"{self.recomputed_peak / 2**30:,.2f} GiB"
            word += f" with blocks recomputed, as auto does ({least} with all of them)"
        return f"peak {peak} of {memory} ({self.device}), at the {self.at}: {word}"

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        first, kept = self.checkpoint_bytes
        return {
            "peak_bytes": self.peak,
            "parts": self.parts,
            "at": self.at,
            "memory_bytes": self.memory,
            "fits_in_memory": self.does_fit,
            "recomputed_peak_bytes": self.recomputed_peak,
            "device": self.device,
            "imagined_rows": self.imagined,
            "fits": [
                {"flags": fit.flags, "peak_bytes": fit.peak, "fits": fit.fits,
                 "most_rows": fit.most_rows}
                for fit in self.fits
            ],
            "cheapest_change": self.cheapest.flags if self.cheapest else None,
            "several_cards": self.several,
            "steps_per_epoch": None if self.imagined else self.steps,
            "tokens_per_epoch": self.tokens or None,
            "seconds_per_epoch": self.time.seconds_per_epoch if self.time else None,
            "time": asdict(self.time) if self.time else None,
            "cost": self.cost,
            "checkpoint_bytes": first,
            "checkpoints_bytes": kept,
            "choices": [{"name": c.name, "value": str(c.value), "reason": c.reason}
                        for c in self.choices],
        }  # fmt: skip


def plan(config: TrainConfig, wishes: Wishes = Wishes()) -> RunPlan:
    """Return what the run of `config` needs, without loading its weights.

    Where the configuration names a model and no data, rows are imagined, all as long as they may
    be: a model's config alone is enough.

    Raises:
        ConfigError: what would stop `train` before its weights load; a card that is not known; a
            step that cannot be computed without its numbers.
    """
    with quiet_libraries():
        return _plan(config, wishes)


def _plan(config: TrainConfig, wishes: Wishes) -> RunPlan:
    card = read_card(wishes.gpu) if wishes.gpu else None
    if card and wishes.probe:
        raise ConfigError("--probe runs steps here, and --gpu plans for another card. Drop one.")
    if config.train.shard != "none":
        raise ConfigError(
            f"--shard {config.train.shard}: plan counts what a process with the whole base needs, "
            "and not yet what one with a part of it does. Drop it."
        )
    config, adapter, _ = take_adapter(config)
    is_imagined = _names_no_data(config)
    if is_imagined and wishes.probe:
        raise ConfigError("--probe runs steps on real rows. Name them: --dataset FILE.")
    config, why = (config, "") if is_imagined else choose_task(config)
    if card and config.model.dtype == "auto":
        config = _with_dtype(config, "float16" if card.name == "T4" else "bfloat16")
    wish = config.model
    source = resolve_source(
        wish.name_or_path, wish.revision, wish.trust_remote_code, needs_weights=wishes.probe
    )
    train = config.train
    a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows = a_step * _IMAGINED_STEPS if is_imagined else 0
    imagined = imagine(config, source, card.name if card else None, rows)
    resolved = resolve(config, why_task=why, adapter=adapter, imagined=imagined)
    _check_quantization(resolved)
    device = resolved.model.device
    memory = card.memory if card else device_memory(device)
    forecast = _forecast(config, resolved)
    reserve = _reserve(device)
    parts = _with_reserve(forecast, device)
    peak = sum(parts.values())
    least = peak
    if peak > memory and train.gradient_checkpointing is None and device == "cuda":
        recomputed = train.model_copy(update={"gradient_checkpointing": True})
        with_all = config.model_copy(update={"train": recomputed})
        least = reserve(_forecast(with_all, resolved))
    limits = Limits(memory, card.name if card else None, device != "cpu", source, reserve)
    time = _time(config, resolved, card, wishes.probe, is_imagined)
    return RunPlan(
        peak=peak,
        parts=parts,
        at=forecast.at,
        memory=memory,
        device=card.name if card else _describe(device),
        steps=steps_per_epoch(config, resolved),
        tokens=0 if is_imagined else int(resolved.data.facts["tokens"]),
        imagined=is_imagined,
        checkpoint_bytes=_checkpoints(config, resolved, parts),
        time=time,
        cost=_cost(config, time, wishes.price_per_hour),
        fits=list_fits(config, limits) if wishes.alternatives else [],
        cheapest=find_cheapest(config, limits) if least > memory else None,
        several=_several(parts, resolved) if device == "cuda" else {},
        choices=resolved.choices,
        recomputed_peak=least if least < peak else None,
    )


def _names_no_data(config: TrainConfig) -> bool:
    """Whether a model is named and no data: then the built-in data is not what is meant."""
    names_model = "name_or_path" in config.model.model_fields_set
    return names_model and "dataset" not in config.data.model_fields_set


def _with_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    model = config.model.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"model": model})


def _check_quantization(resolved: Plan) -> None:
    """Refuse a checkpoint that another library than bitsandbytes quantized."""
    stored = stored_quantization(resolved.model.config)
    if stored is not None and as_quant_config(stored) is None:
        raise ConfigError(
            f"--model {resolved.model.source.name} is quantized by {quantization_name(stored)}, "
            "whose memory cannot be planned: it is known of plain models and of bitsandbytes'. "
            "Plan for the model it was made from, with --quant."
        )


def _forecast(config: TrainConfig, resolved: Plan) -> MemoryForecast:
    try:
        return forecast_memory(config, resolved)
    except FtlevelError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"the step of {resolved.model.family} with --method {config.method.kind} cannot be "
            f"computed without its weights ({reason}), so its memory is not known. Train with "
            "--max-steps 2: summary.json has the peak."
        ) from error


def _describe(device: str) -> str:
    return "the memory of this machine" if device == "cpu" else describe_device(device)


def _reserve(device: str) -> Callable[[MemoryForecast], int]:
    return lambda forecast: sum(_with_reserve(forecast, device).values())


def _with_reserve(forecast: MemoryForecast, device: str) -> dict[str, int]:
    """Return the parts, on a GPU with what its context and its allocator take."""
    if device != "cuda":
        return forecast.parts
    moving = sum(forecast.parts.get(part, 0) for part in _COMES_AND_GOES)
    return {**forecast.parts, ALLOCATOR: CONTEXT_BYTES + int(SLACK * moving)}


def _time(
    config: TrainConfig, resolved: Plan, card: Card | None, probe: bool, is_imagined: bool
) -> TimeForecast | None:
    if probe:
        return by_probe(config, resolved)
    return by_roofline(config, resolved, card) if card and not is_imagined else None


def _cost(config: TrainConfig, time: TimeForecast | None, price: float | None) -> float | None:
    if price is None or time is None:
        return None
    return time.seconds_per_epoch * config.train.num_train_epochs / 3600 * price


def _checkpoints(config: TrainConfig, resolved: Plan, parts: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes of a checkpoint, weights and optimizer, and of those kept at a time."""
    trained, _ = count_trainable(config, resolved)
    one = 4 * trained + parts.get(OPTIMIZER, 0)
    limit = config.train.save_total_limit or 1
    epochs = math.ceil(config.train.num_train_epochs)
    return one, one * (limit if config.train.save_strategy else min(limit, epochs))


def _several(parts: Mapping[str, int], resolved: Plan) -> dict[int, dict[str, int]]:
    """Return what each of some cards needs, by DDP and by FSDP.

    DDP holds gradients a second time, in its buckets. FSDP parts weights, gradients and states
    among the cards, and gathers two blocks at a time. Neither was measured.
    """
    blocks = getattr(resolved.model.config.get_text_config(), "num_hidden_layers", 1) or 1
    gradients = parts.get(GRADIENTS, 0) or parts.get(ADAPTER, 0)
    shared = sum(size for part, size in parts.items() if part not in (*_COMES_AND_GOES, ALLOCATOR))
    shared += gradients
    rest = sum(parts.values()) - shared
    return {
        cards: {
            "ddp": sum(parts.values()) + gradients,
            "fsdp": rest + shared // cards + 2 * shared // blocks,
        }
        for cards in (2, 4, 8)
    }
