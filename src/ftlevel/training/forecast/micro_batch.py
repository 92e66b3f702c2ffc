"""Choice of the micro-batch size, in tokens, that fits in memory.

    T' = ⌊T · (M − fixed) / moving⌋

T tokens need `moving` bytes that grow with T and `fixed` bytes that do not; M is the memory.
Attention grows faster, so results are estimated again until they fit. Loss and gradient of a step
change only in summation order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import psutil

from ftlevel.config import SpeedConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.store import row_lengths
from ftlevel.errors import ConfigError
from ftlevel.fast.plan import FEWEST_TOKENS
from ftlevel.models.hardware import free_memory_bytes
from ftlevel.training.forecast.fits import Device
from ftlevel.training.forecast.memory import StepMemory
from ftlevel.training.forecast.meta_model import ACTIVATIONS, LOGITS, WORKSPACE
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

_GROWS = (ACTIVATIONS, LOGITS, WORKSPACE)

CPU_OVERHEAD_BYTES = 600 * 2**20
"""Resident bytes of a CPU run that are neither tensors nor there before the model: kernel code,
heap fragmentation, libraries. The runs in docs/plan.md need 350 to 500 MiB."""

_SLACK = 0.98
"""Factor on the linear estimate, so that the next estimate is below the memory."""

_ATTEMPTS = 6


def choose_micro_batch(run: Run, processes: Processes, resumed_tokens: int | None) -> Run:
    """Return the run with the largest micro-batch that fits, as the first process computes it.

    `resumed_tokens` is the micro-batch size in tokens of a resumed run, which is kept.

    Raises:
        ConfigError: the run has no micro-batches to size, or a single row does not fit.
    """
    if resumed_tokens is not None:
        choice = Choice("micro-batch", f"{resumed_tokens:,} tokens", "as the run was begun")
        return _with_tokens(run, resumed_tokens, 0, choice)

    def choose() -> tuple[int, int, Choice]:
        fitted = fit_micro_batch(run, find_memory(run.config.speed, run.model.device, processes))
        fast = fitted.fast
        return fast.tokens, fast.memory, fast.choices[-1]

    return _with_tokens(run, *processes.from_first(choose))


def find_memory(speed: SpeedConfig, device: str, processes: Processes) -> int:
    """Return the bytes a process may allocate for tensors in addition to its current ones."""
    limit = speed.memory_gib
    free = free_memory_bytes(device)
    if device != "cpu":
        return free if limit is None else min(free, int(limit * 2**30))
    if limit is not None:
        free = min(free, int(limit * 2**30) - psutil.Process().memory_info().rss)
    else:
        free //= processes.world.local_size
    return free - CPU_OVERHEAD_BYTES


def fit_micro_batch(run: Run, memory: int) -> Run:
    """Return the run with the largest micro-batch, in tokens, that fits in `memory` bytes.

    On a GPU, automatic checkpointing recomputes blocks if micro-batches would be too small
    otherwise.

    Raises:
        ConfigError: the model is sharded, the step is plain, or a micro-batch of one row does not
            fit.
    """
    if run.config.train.shard != "none":
        raise ConfigError(
            "--auto-micro-batch does not support --shard. Drop one of them, or set "
            "--tokens-per-micro-batch N."
        )
    if not run.fast.enabled:
        raise ConfigError(
            "--auto-micro-batch needs the fast step. Drop it, or the flag that disables the fast "
            "step (--no-fast, --neftune-noise-alpha)."
        )
    best, default_tokens = _find(run, memory), run.fast.tokens
    is_small = best.tokens < min(FEWEST_TOKENS, default_tokens)
    train, device = run.config.train, run.model.device
    if is_small and not train.recomputes and train.may_recompute(device):
        again = _find(run.with_settings("train", gradient_checkpointing=True), memory)
        best = again if again.tokens > best.tokens else best
    if not best.tokens:
        raise ConfigError(_explain_too_large(run, best.peak, memory))
    peak, available = (f"{size / 2**30:.2f} GiB" for size in (best.peak, memory))
    reason = f"--auto-micro-batch: {peak} at the peak of a step, of {available}"
    choice = Choice("micro-batch", f"{best.tokens:,} tokens", reason)
    return _with_tokens(run, best.tokens, memory, choice)


class _Found(NamedTuple):
    """Most tokens that fit (0: none), and the peak bytes of the last estimate."""

    tokens: int
    peak: int


def _find(run: Run, memory: int) -> _Found:
    tokens, max_row_tokens = _max_tokens_to_try(run), int(row_lengths(run.data.train).max())
    device = Device(run.model.device, run.model.device, memory)
    for _ in range(_ATTEMPTS):
        forecast = device.forecast(_with_tokens(run, tokens, memory))
        peak = forecast.peak
        if peak <= memory:
            return _Found(tokens, peak)
        if forecast.tokens <= max_row_tokens:  # a row alone
            break
        tokens = _reduce_tokens(
            forecast, min(tokens, forecast.tokens * run.fast.workers), peak, memory
        )
        if tokens < 1:
            break
    return _Found(0, peak)


def _reduce_tokens(forecast: StepMemory, tokens: int, peak: int, memory: int) -> int:
    """Apply the formula; return 0 if the fixed bytes alone exceed the memory."""
    growing = sum(forecast.parts.get(part, 0) for part in _GROWS)
    free = memory - (peak - growing)
    return min(tokens - 1, int(_SLACK * tokens * free / growing)) if free > 0 and growing else 0


def _max_tokens_to_try(run: Run) -> int:
    """Return the largest size to try: the default on a CPU, a whole step elsewhere."""
    if run.model.device == "cpu":
        return run.fast.tokens
    return max(run.fast.tokens, run.config.train.rows_per_device_step * run.data.max_length)


def _explain_too_large(run: Run, peak: int, memory: int) -> str:
    options = [] if run.config.train.recomputes else ["--gradient-checkpointing"]
    options += ["a smaller --max-length", "--set speed.parallel_workers=1"][: run.fast.workers]
    options += [] if run.config.quant.kind != "none" else ["--quant 4bit"]
    return (
        f"--auto-micro-batch: micro-batches of one row need {peak / 2**30:.2f} GiB, and "
        f"{max(0, memory) / 2**30:.2f} GiB of the device {run.model.device} are left for tensors. "
        f"Try {', '.join(options)}; ftlevel plan says what fits."
    )


def _with_tokens(run: Run, tokens: int, memory: int, choice: Choice | None = None) -> Run:
    """Return the run with `tokens` per micro-batch, also set in its configuration."""
    sized = run.with_settings("speed", tokens_per_micro_batch=tokens, memory_gib=None)
    choices = [] if choice is None else [choice]
    fast = replace(run.fast, tokens=tokens, memory=memory, choices=[*run.fast.choices, *choices])
    return replace(sized, fast=fast, choices=[*run.choices, *choices])
