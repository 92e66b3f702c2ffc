"""Memory and time of the rollouts of `--task rl`, and of the models that score them.

    keys and values = 2 · 2 · layers · key heads · head_dim · rows · (prompt + completion + room)
    decoding        = tokens of a completion · (weights + keys and values) / memory bandwidth

The first factor 2 is for keys and values; the second for the copy that is made when rows finish and
others begin. Completions are assumed to have the maximum length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.config.rl import RL_TASK
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.decoding import ROOM
from ftlevel.evaluation.sampling import SamplingOptions
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import build_task_model
from ftlevel.tasks.rl.rows import stand_in_completions
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model
from ftlevel.training.forecast.meta_model import LOGITS
from ftlevel.training.plan.run import Run

KEYS_AND_VALUES = "keys and values"
SCORING_MODELS = "teacher and reward models"
SAMPLING = "sampling"

_LOGITS_COPIES = 5
"""Float32 tensors of (rows, vocabulary) alive while tokens are drawn."""

_STORED = {"4bit": 0.56, "8bit": 1.02}
"""Bytes per weight of a quantized model, with its scales."""


@dataclass(frozen=True)
class RolloutSize:
    """Sizes of the largest rollout: rows sampled together, and tokens of each."""

    rows: int
    prompt: int
    completion: int

    @classmethod
    def of(cls, run: Run) -> RolloutSize | None:
        """Return the largest rollout of `run`; None if this process does not sample."""
        settings, train = run.config.rl, run.config.train
        if run.config.task != RL_TASK or settings.rollouts is not None:
            return None
        held_out = min(len(run.data.validation), train.max_generate_samples)
        step = train.per_device_train_batch_size * train.gradient_accumulation_steps
        prompts = max(step, held_out, min(settings.check_groups, len(run.data.train)))
        most = max(SamplingOptions.most_rows, settings.num_generations)
        rows = min(prompts, most // settings.num_generations) * settings.num_generations
        return cls(rows, max(prompt_lengths(run)), settings.max_completion_length)

    def cache_bytes(self, run: Run, rows: int | None = None) -> int:
        """Return the bytes of keys and values of `rows`, by default of all."""
        text = run.model.config.get_text_config()
        heads = text.num_attention_heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        token = 2 * text.num_hidden_layers * groups * width * DTYPES[run.model.dtype].itemsize
        positions = self.prompt + self.completion + ROOM
        return int(token * positions * (self.rows if rows is None else rows))


def prompt_lengths(run: Run) -> Sequence[int]:
    """Return the number of tokens of each prompt."""
    return [len(row.input_ids) for row in run.data.train]


def with_completions(run: Run, rows: list[Encoded]) -> list[Encoded]:
    """Return the rows of a step; in reinforcement learning, completions of maximum length."""
    if run.config.task != RL_TASK:
        return rows
    count, tokens = run.config.rl.num_generations, run.config.rl.max_completion_length
    return [
        completion
        for row in rows
        for completion in stand_in_completions(row.input_ids, row.row, count, tokens)
    ]


def estimate_sampling_parts(run: Run, size: RolloutSize) -> dict[str, int]:
    """Estimate part → bytes that sampling takes beside the weights."""
    logits = 4 * _LOGITS_COPIES * size.rows * run.model.vocabulary
    return {KEYS_AND_VALUES: 2 * size.cache_bytes(run), LOGITS: logits}


def scoring_models(run: Run) -> list[ModelRef]:
    """Return the teacher and the reward models, which stay loaded during the run."""
    if run.config.task != RL_TASK:
        return []
    device, teacher = run.model.device, run.config.distillation.teacher
    names = [("--teacher", teacher)] if teacher else []
    names += [("--reward", spec.name) for spec in run.config.rl.rewards if spec.kind == "model"]
    return [resolve_model(name, device=device, said=f"{flag} {name}") for flag, name in names]


def estimate_scoring_bytes(run: Run) -> int:
    """Estimate the bytes of the weights of the teacher and the reward models."""
    return sum(_weight_bytes(ref, run) for ref in scoring_models(run))


def _weight_bytes(ref: ModelRef, run: Run) -> int:
    model: Any = build_task_model(ref.model_config, ref.auto_class)
    count = sum(parameter.numel() for parameter in model.parameters())
    stored = _STORED.get(str(ref.quantization.get("kind")))
    return int(count * (stored or DTYPES[run.model.dtype].itemsize))


def estimate_sampling_seconds(
    run: Run, size: RolloutSize, weights: int, bandwidth: float, flops: float
) -> float:
    """Estimate the seconds to sample for all prompts once, from a roofline.

    `weights` are bytes; `bandwidth` bytes/s and `flops` operations/s, as reached.
    """
    lengths = prompt_lengths(run)
    group, step = run.config.rl.num_generations, run.config.train.per_device_train_batch_size
    step *= run.config.train.gradient_accumulation_steps
    at_once = min(size.rows, step * group)
    turns = math.ceil(len(lengths) * group / at_once)
    cache = size.cache_bytes(run, at_once)
    decoding = turns * size.completion * (weights + cache) / bandwidth
    prefill = 2 * run.model.total_parameters * sum(lengths) / flops
    return decoding + prefill
