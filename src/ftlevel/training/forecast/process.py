"""Resident memory of the whole process of a run on a CPU, which is what runs out there.

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
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES, resident_bytes
from ftlevel.training.forecast.live import (
    ACTIVATIONS,
    ADAPTER,
    CASTS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
)
from ftlevel.training.forecast.memory import MemoryForecast, forecast_memory
from ftlevel.training.plan.plan import Plan
from ftlevel.training.proof import PROBE_SCORES
from ftlevel.training.verify.few_rows import choose_few

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
