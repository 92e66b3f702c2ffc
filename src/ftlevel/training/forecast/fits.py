"""What else fits: method × quantization × checkpointing × rows × length, and the cheapest change.

Every line is a forecast of its own, of rows that are all as long as they may be. What a step holds
for its tokens grows with the rows of a micro-batch, so the largest number that fits follows:

    most rows = (memory − what does not come and go) / (activations and workspace of a row)

Resident memory of the whole process of a run on a CPU, which is what runs out there.

    process = libraries + max(loading, check, training, proof)

- libraries: Python with its libraries, the tokenizer and the rows, as measured in this process,
  and `LATER` for what a run imports and compiles after its first step;
- loading: the weights, and the pages of the checkpoint that they are converted from;
- check: the plain step on a few rows in float32, which every run compares with its fast step: the
  narrow weights beside those in float32, two further gradients of what is trained and its start;
- training: the tensors of a step; free blocks of the heap, up to `MOST_HOLES`; and two copies of a
  language head's weight, as large as what a step was measured to hold beyond these;
- with quantized weights, the pages of the checkpoint that the other weights are still mapped from;
- proof: logits of the trained and of the reloaded model on a few rows.

What a run needs of a device, and whether there is as much: the verdict in a line.

The verdict of the plan at the beginning of a run, and beside what was measured at its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.methods import METHODS
from ftlevel.models.hardware import (
    DTYPES,
    describe_device,
    device_memory,
    peak_memory_bytes,
    reserved_memory_bytes,
    resident_bytes,
)
from ftlevel.models.quantization import as_quant_config, quantization_name, stored_quantization
from ftlevel.models.sources import ModelSource
from ftlevel.training.forecast.memory import MemoryForecast, count_computed_layers, forecast_memory
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    CASTS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    QUANTIZED,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
    imagine,
)
from ftlevel.training.forecast.seconds import Card
from ftlevel.training.forecast.shares import GATHERED, REDUCED, describe_shares
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.proof import PROBE_SCORES
from ftlevel.training.verify.proof import choose_few

LATER = 40 * 2**20
"""Code of libraries that is first used in a step, and modules that are imported then; measured."""

HOLES = 0.35
"""Free blocks of the heap as a share of the tensors that come and go, as measured on MiniLM."""

MOST_HOLES = 128 * 2**20
"""What the heap keeps free at its end (`KEPT_FREE` of cli/startup/heap.py): beyond, it shrinks."""

_COME_AND_GO = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS)
_NARROW = {"bfloat16": 2, "float16": 2}


def estimate_process(config: TrainConfig, plan: Plan, step: MemoryForecast) -> int:
    """Return the most bytes that the process of the run has resident.

    Args:
        config: the whole configuration.
        plan: of the run, on a CPU.
        step: the memory of its training step.
    """
    libraries = resident_bytes() + LATER
    mapped = _mapped_bytes(plan, step)
    return libraries + max(
        _bytes_of_loading(plan, step),
        mapped + _bytes_of_check(config, plan),
        mapped + _with_holes(step.parts) + _bytes_of_head_copies(plan),
        mapped + _bytes_of_proof(step),
    )


def _mapped_bytes(plan: Plan, step: MemoryForecast) -> int:
    """Return the pages of the checkpoint that were read to be quantized and are still mapped."""
    planned = plan.model
    dtype = DTYPES[planned.dtype]
    is_converted = planned.source.gguf_file is None and planned.config.dtype != dtype
    if planned.quant.kind == "none" or is_converted:
        return 0
    return max(0, planned.total_parameters * dtype.itemsize - step.parts.get(WEIGHTS, 0))


def _bytes_of_head_copies(plan: Plan) -> int:
    hidden = getattr(plan.model.config.get_text_config(), "hidden_size", 0)
    return 2 * DTYPES[plan.model.dtype].itemsize * plan.model.vocabulary * hidden


def _with_holes(parts: dict[str, int]) -> int:
    moving = sum(parts.get(part, 0) for part in _COME_AND_GO)
    return sum(parts.values()) + min(MOST_HOLES, int(HOLES * moving))


def _bytes_of_loading(plan: Plan, step: MemoryForecast) -> int:
    path, held = plan.model.source.path, step.parts.get(WEIGHTS, 0)
    if path is None:
        return held
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return held + sum(file.stat().st_size for file in files)


def _bytes_of_check(config: TrainConfig, plan: Plan) -> int:
    """Return the bytes of the comparison of the fast step with the plain one; 0 for none."""
    few = choose_few(plan.data.train) if plan.fast.enabled else []
    if config.speed.verify is False or not few:
        return 0
    train = {"per_device_train_batch_size": len(few), "gradient_accumulation_steps": 1}
    plain = config.model_copy(update={"train": config.train.model_copy(update=train)})
    wide: Any = replace(
        plan,
        model=replace(plan.model, dtype="float32"),
        fast=replace(plan.fast, enabled=False),
        data=replace(plan.data, train=few),
    )
    found = forecast_memory(plain, wide, 0)
    moments = [dict(parts) for moment, parts in found.moments.items() if moment != UPDATE]
    for each in moments:
        each.pop(OPTIMIZER, None)
    parts = max(moments, key=lambda each: sum(each.values()))
    weights, trained = parts.get(WEIGHTS, 0), parts.get(ADAPTER, 0)
    is_whole = METHODS[config.method.kind].build is None  # whose weights are in float32 anyhow
    narrow = 0 if is_whole else weights * _NARROW.get(plan.model.dtype, 0) // 4
    gradients = max(parts.get(GRADIENTS, 0), weights if is_whole else trained)
    parts[GRADIENTS] = gradients  # of one way, of the other, and where it began
    return _with_holes({part: int(size) for part, size in parts.items()}) + int(
        narrow + 2 * gradients
    )


def _bytes_of_proof(step: MemoryForecast) -> int:
    held = sum(step.parts.get(part, 0) for part in step.parts if part not in
               (*_COME_AND_GO, OPTIMIZER, GRADIENTS))  # fmt: skip
    return held + 4 * 4 * PROBE_SCORES


ALLOCATOR = "allocator and context"

CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""What a CUDA context takes, and the share of what comes and goes that torch's allocator has to
spare: an allowance, since no card was at hand to measure either."""

COMES_AND_GOES = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS, GRADIENTS, GATHERED, REDUCED)


@dataclass(frozen=True)
class Device:
    """Where a run is planned.

    Attributes:
        kind: torch device type.
        name: in words.
        memory: its bytes.
        ranks: such devices that the run is shared out among, as `--shard` says.
    """

    kind: str
    name: str
    memory: int
    ranks: int = 1

    @classmethod
    def of(cls, kind: str, card: Card | None = None, ranks: int = 1) -> Device:
        """Return `card`, or the device of this machine of that torch type."""
        if card is not None:
            return cls(kind, card.name, card.memory, ranks)
        name = "the memory of this machine" if kind == "cpu" else describe_device(kind)
        return cls(kind, name, device_memory(kind))

    def forecast(self, config: TrainConfig, plan: Plan) -> MemoryForecast:
        """Return what the run takes, on a GPU with what its context and its allocator take.

        Of several devices it is the one that holds most.

        Raises:
            ConfigError: the step cannot be computed without its numbers.
        """
        context = CONTEXT_BYTES if self.kind == "cuda" else 0
        try:
            found = self._tensors(config, plan, self.memory - context)
        except FtlevelError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"the step of {plan.model.family} with --method {config.method.kind} cannot be "
                f"computed without its weights ({reason}), so its memory is not known. Train with "
                "--max-steps 2: summary.json has the peak."
            ) from error
        if context:
            moving = sum(found.parts.get(part, 0) for part in COMES_AND_GOES)
            found.parts[ALLOCATOR] = context + int(SLACK * moving)
        return found

    def _tensors(self, config: TrainConfig, plan: Plan, memory: int) -> MemoryForecast:
        if self.ranks == 1:
            return forecast_memory(config, plan, memory)
        way = config.train.shard
        shares = describe_shares(config, plan)
        saved = 0 if way == "none" else int(sum(shares.saved(self.ranks).values()))
        return shares.of_a_rank(forecast_memory(config, plan, memory + saved), self.ranks, way)


@dataclass(frozen=True)
class Need:
    """What a run needs.

    Attributes:
        parts: part → bytes at the peak.
        at: the moment of the peak.
        device: what is planned for.
        tokens: places of the fullest micro-batch.
        recomputed_peak: of a run that will recompute blocks until it fits, with all of them; None
            of another, and of one that fits as it is.
        process: bytes of the whole process, tensors among them; None where memory of its own, as a
            GPU's, is what runs out.
    """

    parts: dict[str, int]
    at: str
    device: Device
    tokens: int
    recomputed_peak: int | None = None
    process: int | None = None

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def does_fit(self) -> bool:
        """Whether there is as much memory, with blocks recomputed where the run does so itself."""
        most = self.process or self.peak
        return min(most, self.recomputed_peak or most) <= self.device.memory

    def verdict(self) -> str:
        """Return it in a line."""
        peak, memory = (f"{size / 2**30:,.2f} GiB" for size in (self.peak, self.device.memory))
        word = "fits" if self.does_fit else "does not fit"
        if self.recomputed_peak is not None:
            least = f"{self.recomputed_peak / 2**30:,.2f} GiB"
            word += f" with blocks recomputed, as auto does ({least} with all of them)"
        whole = "" if self.process is None else f", {self.process / 2**30:,.2f} GiB the process"
        return f"peak {peak}{whole} of {memory} ({self.device.name}), at the {self.at}: {word}"


def find_need(config: TrainConfig, plan: Plan, device: Device) -> Need:
    """Return what the run that `plan` is needs of `device`.

    Raises:
        ConfigError: as `Device.forecast` does; a base that another library than bitsandbytes
            quantized.
    """
    _check_quantization(plan)
    found = device.forecast(config, plan)
    shares_memory = device.kind == "cpu" and device.ranks == 1
    process = estimate_process(config, plan, found) if shares_memory else None
    need = Need(found.parts, found.at, device, found.tokens, process=process)
    chooses = config.train.gradient_checkpointing is None and device.kind == "cuda"
    if need.does_fit or not chooses:
        return need
    recomputing = config.train.model_copy(update={"gradient_checkpointing": True})
    least = device.forecast(config.model_copy(update={"train": recomputing}), plan).peak
    return replace(need, recomputed_peak=least if least < need.peak else None)


def _check_quantization(plan: Plan) -> None:
    """Refuse a checkpoint that another library than bitsandbytes quantized."""
    stored = stored_quantization(plan.model.config)
    if stored is not None and as_quant_config(stored) is None:
        raise ConfigError(
            f"--model {plan.model.source.name} is quantized by {quantization_name(stored)}, "
            "whose memory cannot be planned: it is known of plain models and of bitsandbytes'. "
            "Plan for the model it was made from, with --quant."
        )


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


MOST_BLOCKS = 16
"""That are computed for a verdict: each takes about a twentieth of a second."""

LEAST_PARAMETERS = 4_000_000
"""Of a model whose memory is worth a word: weights, gradients and states of fewer are less than a
tenth of what Python takes with its libraries."""

_HOW = {
    "cpu": "resident, above what the process held before the model: with copies that reading and "
    "products make",
    "cuda": "reserved by torch's allocator",
    "mps": "resident in this process",
}


@dataclass(frozen=True)
class Foresight:
    """What a run was said to need before it began.

    Attributes:
        need: what it needs; None where that was not computed.
        reason: why it was not.
    """

    need: Need | None
    reason: str = ""

    def choice(self) -> Choice:
        """Return the line of the screen."""
        if self.need is None:
            known = f"not estimated{'' if self.reason else '; run `ftlevel plan`'}"
            return Choice("memory", known, self.reason)
        return Choice("memory", self.need.verdict(), "the plan; its parts: ftlevel plan")

    def compare(self, before: int) -> dict[str, Any]:
        """Return the plan beside what was measured, for summary.json; bytes.

        Args:
            before: that this process had resident before the model was loaded.
        """
        if self.need is None:
            return {"peak_bytes": None, "reason": self.reason}
        need, kind = self.need, self.need.device.kind
        if kind == "cuda":
            planned, measured = need.peak - CONTEXT_BYTES, reserved_memory_bytes()
        else:
            planned, measured = need.peak, peak_memory_bytes(kind) - before
        return {
            "peak_bytes": planned,
            "process_bytes": need.process,
            "parts": need.parts,
            "at": need.at,
            "memory_bytes": need.device.memory,
            "fits_in_memory": need.does_fit,
            "verdict": need.verdict(),
            "measured_bytes": measured,
            "measured_process_bytes": None if need.process is None else peak_memory_bytes(kind),
            "measured": _HOW.get(kind, _HOW["mps"]),
            "off": planned / max(1, measured) - 1
            if kind == "cuda"
            else None,  # elsewhere more is counted
        }


def foresee(config: TrainConfig, plan: Plan, processes: int) -> Foresight:
    """Return what the run needs of its device, where that is soon known.

    Args:
        config: the whole configuration.
        plan: its plan.
        processes: that train together.
    """
    if processes > 1:
        return Foresight(None, f"{processes} processes; run `ftlevel plan`")
    if plan.model.total_parameters < LEAST_PARAMETERS:
        return Foresight(None, "a small model: Python and its libraries take more")
    if count_computed_layers(plan) > MOST_BLOCKS:
        return Foresight(None)
    try:
        return Foresight(find_need(config, plan, Device.of(plan.model.device)))
    except FtlevelError as error:
        return Foresight(None, str(error))
