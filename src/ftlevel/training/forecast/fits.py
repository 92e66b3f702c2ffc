"""What else fits: method × quantization × checkpointing × rows × length, and the cheapest change.

Every line is a forecast of its own, of rows that are all as long as they may be. What a step holds
for its tokens grows with the rows of a micro-batch, so the largest number that fits follows:

    most rows = (memory − what does not come and go) / (activations and workspace of a row)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.models.sources import ModelSource
from ftlevel.training.forecast.imagined import imagine
from ftlevel.training.forecast.live import (
    ACTIVATIONS,
    ADAPTER,
    OPTIMIZER,
    QUANTIZED,
    WEIGHTS,
    WORKSPACE,
)
from ftlevel.training.forecast.memory import MemoryForecast
from ftlevel.training.forecast.need import Device
from ftlevel.training.plan.resolve import resolve

_MOST_ROWS = 4096
_METHODS: tuple[tuple[str, str], ...] = (("lora", "none"), ("qlora", "4bit"), ("full", "none"))


@dataclass(frozen=True)
class Fit:
    """A line of the table.

    Attributes:
        flags: what is typed for it.
        peak: bytes with the rows of a micro-batch that the flags say.
        fits: whether that is within the memory.
        most_rows: of a micro-batch that fit; 0 for none, None where their number changes nothing.
        least: bytes that stay whatever the rows and their length are.
    """

    flags: str
    peak: int
    fits: bool
    most_rows: int | None
    least: int


@dataclass(frozen=True)
class Limits:
    """What there is.

    Attributes:
        device: that a run may use.
        card: name of a GPU that is planned for, or None.
        source: the model.
        tokenizer: of the model.
        known: what was tried (mutated).
        check: called before a line is computed; may raise to stop.
    """

    device: Device
    card: str | None
    source: ModelSource
    tokenizer: Any
    known: dict[Any, Fit | None] = field(default_factory=dict)
    check: Callable[[], object] = bool


def list_fits(config: TrainConfig, limits: Limits) -> list[Fit]:
    """Return the table: the run's own method and the usual ones, with and without checkpointing."""
    own = config.method.kind, config.quant.kind
    others = (way for way in _METHODS if way != _alike(own))
    ways = [own, *others]
    rows = config.train.per_device_train_batch_size
    found = [_try(config, way, ckpt, rows, None, limits)
             for way, ckpt in itertools.product(ways, (False, True))]  # fmt: skip
    length = config.data.max_length
    if isinstance(length, int):
        for other in (length // 2, length * 2):
            found.append(_try(config, own, config.train.recomputes, rows, other, limits))
    return [fit for fit in found if fit is not None]


def _alike(way: tuple[str, str]) -> tuple[str, str]:
    """Return the name of the table for `way`: QLoRA is LoRA on 4 bits."""
    return ("qlora", "4bit") if way == ("lora", "4bit") else way


def find_cheapest(config: TrainConfig, limits: Limits) -> Fit | None:
    """Return the mildest change that makes a run fit that does not; None where none does.

    Fewer rows at once make the same steps, a little slower; checkpointing costs a third of the
    speed; 4 bits cost precision; shorter rows cost data.
    """
    train, own = config.train, (config.method.kind, config.quant.kind)
    rows, ckpt = train.per_device_train_batch_size, train.recomputes
    four = own if own[1] == "4bit" else _alike((own[0], "4bit"))
    length = config.data.max_length
    ways: list[tuple[tuple[str, str], bool, int, int | None]] = []
    for quant, checkpointing in ((own, ckpt), (own, True), (four, ckpt), (four, True)):
        ways += [(quant, checkpointing, some, None) for some in (rows, max(1, rows // 2), 1)]
    if isinstance(length, int):
        ways += [(four, True, 1, length // part) for part in (2, 4, 8) if length // part >= 64]
    too_large = set()
    for way, checkpointing, some, other in dict.fromkeys(ways):
        if way in too_large:
            continue
        fit = _try(config, way, checkpointing, some, other, limits)
        if fit is not None and fit.fits:
            return fit
        if fit is not None and fit.least > limits.device.memory:
            too_large.add(way)
    return None


def _try(
    config: TrainConfig,
    way: tuple[str, str],
    checkpointing: bool,
    rows: int,
    length: int | None,
    limits: Limits,
) -> Fit | None:
    """Return a line of the table; None for what cannot be configured or is refused."""
    key = (way, checkpointing, rows, length)
    limits.check()
    if key not in limits.known:
        limits.known[key] = _compute(config, way, checkpointing, rows, length, limits)
    return limits.known[key]


def _compute(
    config: TrainConfig,
    way: tuple[str, str],
    checkpointing: bool,
    rows: int,
    length: int | None,
    limits: Limits,
) -> Fit | None:
    changed = _changed(config, way, checkpointing, length)
    if changed is None:
        return None
    try:
        forecast = _forecast(changed, rows, limits)
    except FtlevelError:  # the method is not for this model, or the row is longer than it takes
        return None
    memory, most = limits.device.memory, None
    moving = sum(forecast.parts.get(part, 0) for part in (ACTIVATIONS, WORKSPACE))
    if limits.device.kind != "cpu":  # which takes one micro-batch of a fixed size after another
        free = memory - forecast.peak
        most = min(max(0, rows + int(free // (moving / rows))), _MOST_ROWS)
    least = sum(forecast.parts.get(part, 0) for part in (WEIGHTS, QUANTIZED, ADAPTER, OPTIMIZER))
    flags = " ".join(_flags(config, way, checkpointing, rows, length))
    return Fit(flags, forecast.peak, forecast.peak <= memory, most, least)


def _forecast(config: TrainConfig, rows: int, limits: Limits) -> MemoryForecast:
    accumulated = max(2, config.train.gradient_accumulation_steps)  # gradients are there before
    config = _with(config, {"train": {"per_device_train_batch_size": rows,
                                      "gradient_accumulation_steps": accumulated}})  # fmt: skip
    rows *= accumulated
    imagined = imagine(config, limits.source, limits.card, rows, limits.tokenizer)
    return limits.device.forecast(config, resolve(config, imagined=imagined))


def _changed(
    config: TrainConfig, way: tuple[str, str], checkpointing: bool, length: int | None
) -> TrainConfig | None:
    method, quant = way
    values: dict[str, Any] = {"train": {"gradient_checkpointing": checkpointing}}
    if length is not None:
        values["data"] = {"max_length": length}
    if way != (config.method.kind, config.quant.kind):
        values["quant"] = {"kind": quant}
        values["method"] = {"kind": method} if method != config.method.kind else {}
    try:
        return _with(config, values)
    except (ConfigError, ValueError):
        return None


def _with(config: TrainConfig, values: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
    """Return `config` with other `values`, validated."""
    given: dict[str, Any] = config.model_dump(exclude_unset=True)
    for section, own in values.items():
        kept = {} if section == "method" and "kind" in own else given.get(section, {})
        given[section] = {**kept, **own}
    return TrainConfig.model_validate(given)


def _flags(
    config: TrainConfig, way: tuple[str, str], checkpointing: bool, rows: int, length: int | None
) -> Iterator[str]:
    method, quant = way
    yield f"--method {method}"
    if quant != "none" and method != "qlora":
        yield f"--quant {quant}"
    yield "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"
    before = config.train.per_device_train_batch_size
    yield f"--per-device-train-batch-size {rows}"
    if rows < before:
        accumulated = config.train.gradient_accumulation_steps * -(-before // rows)
        yield f"--gradient-accumulation-steps {accumulated}"
    if length is not None:
        yield f"--max-length {length}"
