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

from collections.abc import Mapping
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
from ftlevel.training.forecast.memory import BlockSample, StepMemory, estimate_step_memory
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    FORWARD,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    PERSISTENT_PARTS,
    QUANTIZED,
    TEMPORARY_PARTS,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
)
from ftlevel.training.forecast.seconds import Gpu
from ftlevel.training.forecast.shares import get_sharded_model
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


def estimate_process(run: Run, step: StepMemory) -> int:
    """Returns the peak resident memory of a CPU run in bytes; `step` estimates its tensors."""
    loaded = sum(step.parts.get(part, 0) for part in (WEIGHTS, QUANTIZED, ADAPTER))
    moments = (_check_bytes(run), _training_bytes(run, step), loaded + 16 * MAX_TEST_LOGITS)
    return (
        resident_bytes()
        + LAZY_IMPORT_BYTES
        + max(_loading_bytes(run, step), _mapped_bytes(run, step) + max(moments))
    )


def _loading_bytes(run: Run, step: StepMemory) -> int:
    path, weights = run.model.source.path, step.parts.get(WEIGHTS, 0)
    if path is None:
        return weights
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return weights + sum(file.stat().st_size for file in files)


def _mapped_bytes(run: Run, step: StepMemory) -> int:
    """Returns the bytes of checkpoint pages that stay mapped after quantization."""
    model, dtype = run.model, DTYPES[run.model.dtype]
    is_converted = model.source.gguf_file is None and model.config.dtype != dtype
    if model.quant.kind == "none" or is_converted:
        return 0
    return max(0, model.total_parameters * dtype.itemsize - step.parts.get(WEIGHTS, 0))


def _training_bytes(run: Run, step: StepMemory) -> int:
    model, hidden = run.model, getattr(run.model.config.get_text_config(), "hidden_size", 0)
    head = DTYPES[model.dtype].itemsize * model.vocabulary * hidden
    return _add_free_heap(step.parts) + 2 * head * run.objective.predicts_tokens


def _add_free_heap(parts: Mapping[str, int]) -> int:
    temporary = sum(parts.get(part, 0) for part in TEMPORARY_PARTS)
    return sum(parts.values()) + min(MAX_FREE_HEAP_BYTES, int(HOLES * temporary))


def _check_bytes(run: Run) -> int:
    """Returns the peak bytes of verifying the fast step before training; 0 if disabled."""
    rows = select_compared_rows(run.data.train) if run.fast.enabled else []
    if run.config.speed.verify is False or not rows:
        return 0
    settings = {"per_device_train_batch_size": len(rows), "gradient_accumulation_steps": 1}
    plain = replace(
        run.hooks.as_checked(run.with_settings("train", **settings)),
        model=replace(run.model, dtype="float32"),
        fast=replace(run.fast, enabled=False),
        data=replace(run.data, train=rows),
    )
    peaks = estimate_step_memory(plain, 0).moments
    moments = [
        {part: int(size) for part, size in peaks[moment].items() if part != OPTIMIZER}
        for moment in peaks.keys() - {UPDATE}
    ]
    parts = max(moments, key=lambda parts: sum(parts.values()))
    weights, trained = parts.get(WEIGHTS, 0), parts.get(ADAPTER, 0)
    is_full = not METHODS[run.config.method.kind].is_adapter  # full: weights are always float32
    copies = 0 if is_full or run.model.dtype == "float32" else weights // 2
    gradients = max(parts.get(GRADIENTS, 0), weights if is_full else trained)
    # Those of the fast and of the plain step, and the initial values.
    return _add_free_heap({**parts, GRADIENTS: 3 * gradients}) + copies


ALLOCATOR = "allocator and context"
CONTEXT_BYTES, SLACK = 600 * 2**20, 0.05
"""Bytes of a CUDA context, and overhead of torch's allocator as a fraction of temporary tensors.
Assumed allowances: neither was measured on a GPU."""


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
        memory, sharded = self.memory - context, None
        try:
            if self.ranks > 1:
                sharded = get_sharded_model(run, self.ranks)
                memory += int(sum(sharded.saved_bytes.values()))
            step = estimate_step_memory(run, memory)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            message = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"the step of {run.model.family} with --method {run.config.method.kind} cannot be "
                f"computed without its weights ({message}), so its memory is not known. Train with "
                "--max-steps 2: summary.json has the peak."
            ) from error
        step = step if sharded is None else sharded.estimate_rank(step)
        if context:
            temporary = step.peak - sum(step.parts.get(part, 0) for part in PERSISTENT_PARTS)
            step.parts[ALLOCATOR] = context + int(SLACK * temporary)
        return step


@dataclass(frozen=True, kw_only=True)
class MemoryRequirement(StepMemory):
    """Memory requirement of a run on a device; see `StepMemory` for the tensors of a step.

    Attributes:
        recomputed_peak: peak with gradient checkpointing in all blocks, if checkpointing is
            automatic and the run does not fit without; None otherwise.
        process: bytes of the whole process, tensors included; None except for a single CPU process.
    """

    device: Device
    recomputed_peak: int | None = None
    process: int | None = None

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
        process = f" ({self.process / 2**30:,.2f} GiB whole process)" if self.process else ""
        at = f"{self.at} pass" if self.at in (FORWARD, BACKWARD) else self.at
        return (
            f"{word}: peak {self.peak / 2**30:,.2f} GiB{process}, in the {at}; "
            f"{self.device.memory / 2**30:,.2f} GiB available ({self.device.name})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for JSON."""
        return {
            "peak_bytes": self.peak,
            "process_bytes": self.process,
            "parts": self.parts,
            "at": self.at,
            "memory_bytes": self.device.memory,
            "fits_in_memory": self.does_fit,
        }


def estimate_requirement(run: Run, device: Device) -> MemoryRequirement:
    """Returns the memory that `run` needs on `device`.

    ConfigError if the step fails on meta tensors, or for quantization other than bitsandbytes.
    """
    quantization = get_quantization_config(run.model.config)
    if quantization is not None and as_quant_config(quantization) is None:
        raise ConfigError(
            f"--model {run.model.source.name} is quantized by {quantization_name(quantization)}, "
            "whose memory cannot be estimated. Plan for the original model with --quant."
        )
    step = device.forecast(run)
    process = estimate_process(run, step) if device.kind == "cpu" and device.ranks == 1 else None
    need = MemoryRequirement(**vars(step), device=device, process=process)
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
    wanted = min(MIN_TOKENS, run.fast.tokens) if sizes else 1
    try:
        tries = [(*_search_tokens(run, device, sizes=sizes), False)]
        if can_recompute and tries[0][0] < wanted:
            recomputed = run.with_settings("train", gradient_checkpointing=True)
            tries.append((*_search_tokens(recomputed, device, sizes=sizes), True))
    except FtlevelError as error:
        return replace(fit, choices=[*choices, Choice(name, "off", f"auto: {error}")])
    tokens, peak, recomputes = max(tries, key=lambda result: (result[0], -result[1]))
    first, lower, memory = (f"{b / 2**30:,.2f} GiB" for b in (tries[0][1], peak, device.memory))
    if can_recompute:
        message = f"auto: a step needs {first} of {memory}" + f", {lower} with it" * recomputes
        choices = [*choices, Choice(name, "all blocks" if recomputes else "off", message)]
    if not (sizes and tokens):
        return replace(fit, recomputes=recomputes, choices=choices)
    message = f"auto: {lower} at the peak of a step, of {memory}"
    choices = [*choices, Choice("micro-batch", f"{tokens:,} tokens", message)]
    return Fit(tokens, recomputes, device.memory, choices)


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
        forecast = device.forecast(replace(run, fast=replace(run.fast, tokens=tokens)))
        if forecast.peak <= device.memory:
            return max(tokens, 1), forecast.peak  # the plain step has 0
        variable = sum(forecast.parts.get(part, 0) for part in _VARIABLE_PARTS)
        available = device.memory - (forecast.peak - variable)
        if not sizes or forecast.tokens <= longest or available <= 0:  # even a row alone
            break
        tokens = min(tokens, forecast.tokens * run.fast.workers)
        tokens = min(tokens - 1, int(_SAFETY_FACTOR * tokens * available / variable))
    return 0, forecast.peak


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
        need, device, off = self.need, self.need.device.kind, None
        values, measured = need.to_dict(), peak_memory_bytes(device) - before
        if device == "cuda":  # elsewhere the measurement covers more than the estimate
            values["peak_bytes"], measured = need.peak - CONTEXT_BYTES, reserved_memory_bytes()
            off = values["peak_bytes"] / max(1, measured) - 1
        return {
            **values,
            "verdict": need.verdict(),
            "measured_bytes": measured,
            "measured_process_bytes": None if need.process is None else peak_memory_bytes(device),
            "measured": _MEASUREMENT_BY_DEVICE[device],
            "off": off,
        }


def estimate_memory(run: Run, world_size: int) -> MemoryEstimate:
    """Returns a run's `MemoryEstimate`; `need` is None if distributed, tiny or slow to compute."""
    if world_size > 1:
        return MemoryEstimate(None, f"{world_size} processes; run `ftlevel plan`")
    if run.model.total_parameters < MIN_PARAMETERS:
        return MemoryEstimate(None, "a small model: Python and its libraries take more")
    if BlockSample.of(run).count > MAX_BLOCKS:
        return MemoryEstimate(None)
    try:
        return MemoryEstimate(estimate_requirement(run, Device.of(run.model.device)))
    except FtlevelError as error:
        return MemoryEstimate(None, str(error))
