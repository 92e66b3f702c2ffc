"""Memory estimate of a run compared with its device.

    process = libraries + max(loading, check, training, proof)

is the resident memory of a CPU run:

- libraries: Python, its packages, tokenizer and rows, measured in this process, plus
  `LAZY_IMPORT_BYTES`;
- loading: the weights, and the checkpoint pages they are converted from;
- check: the plain step in float32 on a few rows that verifies the fast step: 16-bit weights next to
  float32 ones, the gradients of both steps and the initial values of the trained parameters;
- training: the tensors of a step, free heap blocks up to `MAX_FREE_HEAP_BYTES`, and two copies of
  a language head's weight;
- proof: logits of the trained and of the reloaded model, compared after training on a few rows;
- with quantized weights: pages of the unquantized checkpoint, which stay mapped.

The two copies and the 128 MiB of `MAX_FREE_HEAP_BYTES` are assumed, not traced to a cause. With
them, 21 settings of three models are within 10 % (docs/plan.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.config.section import Choice
from ftlevel.data.encoding.store import row_lengths
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.fast.plan import MIN_TOKENS
from ftlevel.methods import METHODS
from ftlevel.models.hardware import (
    DTYPES,
    device_memory,
    format_device,
    free_memory_bytes,
    peak_memory_bytes,
    reserved_memory_bytes,
    resident_bytes,
)
from ftlevel.models.quantization import as_quant_config, get_quantization_config, quantization_name
from ftlevel.objectives import TokenObjective
from ftlevel.training.forecast.memory import StepMemory, count_computed_layers, estimate_step_memory
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    CASTS,
    FORWARD,
    GRADIENTS,
    KEYS_AND_VALUES,
    LOGITS,
    OPTIMIZER,
    PACKED,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
)
from ftlevel.training.forecast.seconds import Gpu
from ftlevel.training.forecast.shares import GATHERED, REDUCED, get_sharded_model
from ftlevel.training.plan.run import Run
from ftlevel.training.proof import MAX_TEST_LOGITS
from ftlevel.training.verify import select_compared_rows

LAZY_IMPORT_BYTES = 40 * 2**20
"""Bytes of library code and modules that are first used in a training step; measured."""

HOLES = 0.35
"""Free heap blocks as a fraction of temporary tensors; measured on MiniLM."""

MAX_FREE_HEAP_BYTES = 128 * 2**20
"""Assumed cap of free heap blocks: `TRIM_BYTES` of cli/startup.py, above which glibc trims it.
It fits the settings of docs/plan.md and is not proven."""

_TEMPORARY = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS)
_HALF_BYTES = {"bfloat16": 2, "float16": 2}


def estimate_process(run: Run, step: StepMemory) -> int:
    """Returns the peak resident memory of a CPU run in bytes; `step` estimates its tensors."""
    libraries = resident_bytes() + LAZY_IMPORT_BYTES
    mapped = _mapped_bytes(run, step)
    return libraries + max(
        _loading_bytes(run, step),
        mapped + _check_bytes(run),
        mapped + _add_fragmentation(step.parts) + _head_copy_bytes(run),
        mapped + _proof_bytes(step),
    )


def _mapped_bytes(run: Run, step: StepMemory) -> int:
    """Returns the bytes of checkpoint pages that stay mapped after quantization."""
    model = run.model
    dtype = DTYPES[model.dtype]
    is_converted = model.source.gguf_file is None and model.config.dtype != dtype
    if model.quant.kind == "none" or is_converted:
        return 0
    return max(0, model.total_parameters * dtype.itemsize - step.parts.get(WEIGHTS, 0))


def _head_copy_bytes(run: Run) -> int:
    if not isinstance(run.objective, TokenObjective):
        return 0
    hidden = getattr(run.model.config.get_text_config(), "hidden_size", 0)
    return 2 * DTYPES[run.model.dtype].itemsize * run.model.vocabulary * hidden


def _add_fragmentation(parts: dict[str, int]) -> int:
    temporary = sum(parts.get(part, 0) for part in _TEMPORARY)
    return sum(parts.values()) + min(MAX_FREE_HEAP_BYTES, int(HOLES * temporary))


def _loading_bytes(run: Run, step: StepMemory) -> int:
    path, weights = run.model.source.path, step.parts.get(WEIGHTS, 0)
    if path is None:
        return weights
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return weights + sum(file.stat().st_size for file in files)


def _check_bytes(run: Run) -> int:
    """Returns the peak bytes of verifying the fast step before training; 0 if disabled."""
    rows = select_compared_rows(run.data.train) if run.fast.enabled else []
    if run.config.speed.verify is False or not rows:
        return 0
    reference_run = run.with_settings(
        "train", per_device_train_batch_size=len(rows), gradient_accumulation_steps=1
    )
    reference_run = run.hooks.as_checked(reference_run)
    float32_: Any = replace(
        reference_run,
        model=replace(run.model, dtype="float32"),
        fast=replace(run.fast, enabled=False),
        data=replace(run.data, train=rows),
    )
    estimate = estimate_step_memory(float32_, 0)
    moments = [dict(parts) for moment, parts in estimate.moments.items() if moment != UPDATE]
    for moment_parts in moments:
        moment_parts.pop(OPTIMIZER, None)
    parts = max(moments, key=lambda moment_parts: sum(moment_parts.values()))
    weights, trained = parts.get(WEIGHTS, 0), parts.get(ADAPTER, 0)
    is_full = not METHODS[run.config.method.kind].is_adapter  # full: weights are always float32
    half_bytes = 0 if is_full else weights * _HALF_BYTES.get(run.model.dtype, 0) // 4
    grad_bytes = max(parts.get(GRADIENTS, 0), weights if is_full else trained)
    parts[GRADIENTS] = grad_bytes  # fast and plain step, and the initial values
    return _add_fragmentation({part: int(size) for part, size in parts.items()}) + int(
        half_bytes + 2 * grad_bytes
    )


def _proof_bytes(step: StepMemory) -> int:
    persistent = sum(
        step.parts.get(part, 0)
        for part in step.parts
        if part not in (*_TEMPORARY, OPTIMIZER, GRADIENTS)
    )
    return persistent + 4 * 4 * MAX_TEST_LOGITS


ALLOCATOR = "allocator and context"

CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""Bytes of a CUDA context, and overhead of torch's allocator as a fraction of temporary tensors.
Assumed allowances: neither was measured on a GPU."""

TEMPORARY_PARTS = (
    ACTIVATIONS,
    LOGITS,
    WORKSPACE,
    CASTS,
    GRADIENTS,
    GATHERED,
    REDUCED,
    KEYS_AND_VALUES,
    PACKED,
)


@dataclass(frozen=True)
class Device:
    """One device, or `ranks` equal ones that train together; `memory` is the bytes of each."""

    kind: str
    name: str
    memory: int
    ranks: int = 1

    @classmethod
    def of(cls, kind: str, gpu: Gpu | None = None, ranks: int = 1) -> Device:
        """Returns `ranks` GPUs like `gpu`; if it is None, this machine's device of type `kind`."""
        if gpu is not None:
            return cls(kind, gpu.name, gpu.memory, ranks)
        name = "memory of this machine" if kind == "cpu" else format_device(kind)
        return cls(kind, name, device_memory(kind))

    @classmethod
    def of_process(cls, kind: str, ranks: int) -> Device:
        """Returns what is free of this machine's device, less a share that is not estimated."""
        free = int(MEMORY_RATIO * free_memory_bytes(kind)) + CONTEXT_BYTES
        return cls(kind, format_device(kind), free, ranks)

    def forecast(self, run: Run) -> StepMemory:
        """Returns the memory of a run; on a GPU, including CUDA context and allocator overhead.

        With several devices, the estimate is for the rank that needs the most. Raises ConfigError
        if the step cannot run on meta tensors.
        """
        context = CONTEXT_BYTES if self.kind == "cuda" else 0
        try:
            memory = self._tensors(run, self.memory - context)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            message = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"the step of {run.model.family} with --method {run.config.method.kind} cannot be "
                f"computed without its weights ({message}), so its memory is not known. Train with "
                "--max-steps 2: summary.json has the peak."
            ) from error
        if context:
            moving = sum(memory.parts.get(part, 0) for part in TEMPORARY_PARTS)
            memory.parts[ALLOCATOR] = context + int(SLACK * moving)
        return memory

    def _tensors(self, run: Run, memory: int) -> StepMemory:
        if self.ranks == 1:
            return estimate_step_memory(run, memory)
        shard = run.config.train.shard
        sharded = get_sharded_model(run)
        saved_bytes = 0 if shard == "none" else int(sum(sharded.saved_bytes(self.ranks).values()))
        return sharded.estimate_rank(
            estimate_step_memory(run, memory + saved_bytes), self.ranks, shard
        )


@dataclass(frozen=True)
class MemoryRequirement:
    """Memory requirement of a run on a device.

    Attributes:
        parts, at, tokens: as in `StepMemory`.
        recomputed_peak: peak with gradient checkpointing in all blocks, if checkpointing is
            automatic and the run does not fit without; None otherwise.
        process: bytes of the whole process, tensors included; None except for a single CPU process.
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
        """Whether the run fits, possibly with recomputed blocks if checkpointing is automatic."""
        peak = self.process or self.peak
        return min(peak, self.recomputed_peak or peak) <= self.device.memory

    def verdict(self) -> str:
        """Returns a line: whether the run fits, the peak and its phase, and available memory."""
        word = "fits" if self.does_fit else "does not fit"
        if self.recomputed_peak is not None:
            recomputed = f"{self.recomputed_peak / 2**30:,.2f} GiB"
            word += f" with gradient checkpointing, as auto does ({recomputed} with all blocks)"
        process = (
            "" if self.process is None else f" ({self.process / 2**30:,.2f} GiB whole process)"
        )
        at = f"{self.at} pass" if self.at in (FORWARD, BACKWARD) else self.at
        return (
            f"{word}: peak {self.peak / 2**30:,.2f} GiB{process}, in the {at}; "
            f"{self.device.memory / 2**30:,.2f} GiB available ({self.device.name})"
        )


def estimate_requirement(run: Run, device: Device) -> MemoryRequirement:
    """Returns the memory that `run` needs on `device`.

    ConfigError if the step fails on meta tensors, or for quantization other than bitsandbytes.
    """
    _validate_quantization(run)
    memory = device.forecast(run)
    is_host = device.kind == "cpu" and device.ranks == 1
    process = estimate_process(run, memory) if is_host else None
    need = MemoryRequirement(memory.parts, memory.at, device, memory.tokens, process=process)
    is_automatic = run.config.train.gradient_checkpointing is None and device.kind == "cuda"
    if need.does_fit or not is_automatic:
        return need
    peak = device.forecast(run.with_settings("train", gradient_checkpointing=True)).peak
    return replace(need, recomputed_peak=peak if peak < need.peak else None)


MEMORY_RATIO = 0.8
"""Share of free memory that a step may need by the estimate without gradient checkpointing."""


MAX_GPU_TOKENS = 16_384
"""Maximum tokens per micro-batch by default on a GPU; more are no faster."""

_VARIABLE_PARTS = (ACTIVATIONS, LOGITS, WORKSPACE)
_SAFETY_FACTOR = 0.98
"""Factor on the linear estimate, so that the next estimate is below the memory."""

_MAX_ATTEMPTS = 6


@dataclass(frozen=True)
class Fit:
    """Settings with which a step fits by the estimate; `choices` are lines to print.

    Attributes:
        tokens: maximum tokens per micro-batch; 0 leaves the run's.
        recomputes: whether gradient checkpointing that is set to auto is used.
        memory: bytes that `tokens` were chosen for; 0 if they were not.
    """

    tokens: int = 0
    recomputes: bool = False
    memory: int = 0
    choices: list[Choice] = field(default_factory=list)

    def apply(self, run: Run) -> Run:
        """Returns `run` with these settings."""
        choices = [*run.choices, *self.choices]
        run = replace(run, recomputes=self.recomputes, choices=choices)
        if not self.tokens:
            return run
        fast = replace(run.fast, tokens=self.tokens, memory=self.memory)
        return replace(run.with_settings("speed", tokens_per_micro_batch=self.tokens), fast=fast)


def is_sized_by_memory(run: Run) -> bool:
    """Returns whether the micro-batches of `run` are as large as fits: the default on a GPU."""
    is_default = run.config.speed.tokens_per_micro_batch == "auto" and run.model.device == "cuda"
    return is_default and run.fast.enabled and run.config.train.shard == "none"


def fit_run(run: Run, device: Device, previous_tokens: int | None = None) -> Fit:
    """Returns the micro-batch and the checkpointing with which a step of `run` fits on `device`.

    On a GPU, micro-batches are as large as fits, at most `MAX_GPU_TOKENS` or the longest row, or as
    in the run to resume. Checkpointing that is set to auto is used in all blocks if otherwise only
    micro-batches below `MIN_TOKENS` fit, or the given ones do not, and it lowers the need.
    """
    train, name = run.config.train, "gradient checkpointing"
    choices = []
    if train.recomputes:
        message = "; their inputs are in host memory" * train.offload_activations
        choices.append(Choice(name, "all blocks", f"as requested{message}"))
    fit = Fit(choices=choices)
    sizes = is_sized_by_memory(run)
    if sizes and previous_tokens:
        choices.append(Choice("micro-batch", f"{previous_tokens:,} tokens", "as the run was begun"))
        fit, sizes = Fit(previous_tokens, choices=choices), False
        run = replace(run, fast=replace(run.fast, tokens=previous_tokens))
    can_recompute = not train.recomputes and train.may_recompute(device.kind)
    if not (sizes or can_recompute):
        return fit
    try:
        tokens, peak = _search_tokens(run, device, sizes=sizes)
        wanted = min(MIN_TOKENS, run.fast.tokens) if sizes else 1
        other = (0, peak)
        if can_recompute and tokens < wanted:
            recomputed = run.with_settings("train", gradient_checkpointing=True)
            other = _search_tokens(recomputed, device, sizes=sizes)
    except FtlevelError as error:
        return replace(fit, choices=[*choices, Choice(name, "off", f"auto: {error}")])
    recomputes = other[0] > tokens or (other[0] == tokens and other[1] < peak)
    shown, memory, lower = (f"{b / 2**30:,.2f} GiB" for b in (peak, device.memory, other[1]))
    if can_recompute:
        message = f"auto: a step needs {shown} of {memory}" + f", {lower} with it" * recomputes
        choices = [*choices, Choice(name, "all blocks" if recomputes else "off", message)]
    if tokens := max(tokens, other[0]) if sizes else 0:
        message = f"auto: {lower if recomputes else shown} at the peak of a step, of {memory}"
        choices = [*choices, Choice("micro-batch", f"{tokens:,} tokens", message)]
        return Fit(tokens, recomputes, device.memory, choices)
    return replace(fit, recomputes=recomputes, choices=choices)


def _search_tokens(run: Run, device: Device, *, sizes: bool) -> tuple[int, int]:
    """Returns the most tokens per micro-batch that fit (0: none), and the peak of the last try.

    A micro-batch of T tokens needs fixed bytes, and others that grow with T; attention's grow
    faster, so T is corrected until it fits. Without `sizes`, only the run's own are tried.
    """
    longest, tokens = int(row_lengths(run.data.train).max()), run.fast.tokens
    if sizes:
        step = max(tokens, run.config.train.rows_per_device_step * run.data.max_length)
        tokens = min(step, max(MAX_GPU_TOKENS, longest))
    for _ in range(_MAX_ATTEMPTS if sizes else 1):
        fast = replace(run.fast, tokens=tokens)
        forecast = device.forecast(replace(run, fast=fast))
        peak, memory = forecast.peak, device.memory
        if peak <= memory:
            return max(tokens, 1), peak  # the plain step has 0
        if not sizes or forecast.tokens <= longest:  # a row alone
            break
        variable = sum(forecast.parts.get(part, 0) for part in _VARIABLE_PARTS)
        available = memory - (peak - variable)
        if available <= 0 or not variable:
            break
        tokens = min(tokens, forecast.tokens * run.fast.workers)
        tokens = min(tokens - 1, int(_SAFETY_FACTOR * tokens * available / variable))
    return 0, peak


def _validate_quantization(run: Run) -> None:
    quantization_config = get_quantization_config(run.model.config)
    if quantization_config is not None and as_quant_config(quantization_config) is None:
        raise ConfigError(
            f"--model {run.model.source.name} is quantized by "
            f"{quantization_name(quantization_config)}, whose memory cannot be "
            "estimated. Plan for the original model with --quant."
        )


MAX_BLOCKS = 16
"""Most blocks computed for the estimate at the start of a run: about 0.05 s each."""

MIN_PARAMETERS = 4_000_000
"""Smallest model whose memory is estimated at the start of a run: below, weights, gradients and
optimizer states are less than a tenth of Python with its libraries."""

_MEASUREMENT_BY_DEVICE = {
    "cpu": "resident memory above the level before the model was loaded",
    "cuda": "reserved by torch's allocator",
    "mps": "resident in this process",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory estimate made before training; if `need` is None, `reason` says why (may be empty)."""

    need: MemoryRequirement | None
    reason: str = ""

    def choice(self) -> Choice:
        """Returns the line about memory that is printed at the start of the run."""
        if self.need is None:
            value = f"not estimated{'' if self.reason else '; run `ftlevel plan`'}"
            return Choice("memory", value, self.reason)
        return Choice("memory", self.need.verdict(), "estimated; details: ftlevel plan")

    def compare(self, before: int) -> dict[str, Any]:
        """Returns estimated and measured bytes; `before` is the RSS before the model was loaded."""
        if self.need is None:
            return {"peak_bytes": None, "reason": self.reason}
        need, device = self.need, self.need.device.kind
        if device == "cuda":
            planned, measured = need.peak - CONTEXT_BYTES, reserved_memory_bytes()
        else:
            planned, measured = need.peak, peak_memory_bytes(device) - before
        return {
            "peak_bytes": planned,
            "process_bytes": need.process,
            "parts": need.parts,
            "at": need.at,
            "memory_bytes": need.device.memory,
            "fits_in_memory": need.does_fit,
            "verdict": need.verdict(),
            "measured_bytes": measured,
            "measured_process_bytes": None if need.process is None else peak_memory_bytes(device),
            "measured": _MEASUREMENT_BY_DEVICE.get(device, _MEASUREMENT_BY_DEVICE["mps"]),
            "off": planned / max(1, measured) - 1
            if device == "cuda"
            else None,  # elsewhere the measurement covers more than the estimate
        }


def estimate_memory(run: Run, world_size: int) -> MemoryEstimate:
    """Returns a run's `MemoryEstimate`; `need` is None if distributed, tiny or slow to compute."""
    if world_size > 1:
        return MemoryEstimate(None, f"{world_size} processes; run `ftlevel plan`")
    if run.model.total_parameters < MIN_PARAMETERS:
        return MemoryEstimate(None, "a small model: Python and its libraries take more")
    if count_computed_layers(run) > MAX_BLOCKS:
        return MemoryEstimate(None)
    try:
        return MemoryEstimate(estimate_requirement(run, Device.of(run.model.device)))
    except FtlevelError as error:
        return MemoryEstimate(None, str(error))
