"""Memory and time of the rollouts of `--task rl`, and of the scoring models.

    keys and values = 2 · layers · key heads · head_dim · (prompts · (prompt + room)
                      + 2 · rows · (completion + room))
    prefill         = tokens · (inner · (4 v + 12) + 4 · hidden · v) + tokens · prompt · (2 + v)
    decoding        = tokens of a completion · (weights + keys and values) / memory bandwidth

A group shares the keys and values of its prompt; those of completions are copied when rows finish
and others begin, but not on a GPU, where they are stored in pages and as many rows are sampled
together as fit. v is the bytes of an activation, inner the MLP's width, room spare positions; 12 is
three float32 tensors of a LoRA layer. Completions are assumed to have maximum length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.decoding import CACHE_GROWTH
from ftlevel.evaluation.packed_weights import MAX_SHARE
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.paged_sampling import (
    LOGITS_COPIES,
    PAGE_TOKENS,
    cache_token_bytes,
    count_prefill_tokens,
    count_rows_in_memory,
)
from ftlevel.extras.rl.rows import stand_in_completions
from ftlevel.extras.rl.sampling import PREFILL_TOKENS, SamplingOptions
from ftlevel.models.hardware import DTYPES, device_memory
from ftlevel.models.loading import build_task_model
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model
from ftlevel.training.forecast.meta_model import ACTIVATIONS, LOGITS
from ftlevel.training.forecast.seconds import BANDWIDTH_FRACTION, PEAK_FRACTION, Gpu, TimeForecast
from ftlevel.training.plan.run import Run

SCORING_MODELS = "teacher and reward models"
SAMPLING = "sampling"
KEYS_AND_VALUES, PACKED = "keys and values", "packed weights"
INITIAL = "initial weights"
"""Copy of the trained tensors of step 0, for the KL penalty."""

_BYTES_PER_WEIGHT = {"4bit": 0.56, "8bit": 1.02}
"""Bytes per weight of a quantized model, with its scales."""


@dataclass(frozen=True)
class RolloutSize:
    """Size of the largest rollout.

    Attributes:
        prompts: number of prompts sampled together.
        rows: number of completions sampled together.
        prompt: tokens of the longest prompt.
        completion: maximum tokens of a completion.
    """

    prompts: int
    rows: int
    prompt: int
    completion: int

    @classmethod
    def of(cls, run: Run, memory: int) -> RolloutSize | None:
        """Returns the largest rollout of `run`; None if this process does not sample.

        On a GPU, as many completions are sampled together as fit in `memory` bytes.
        """
        config, train = run.config.get_section(RlConfig), run.config.train
        if config.rollouts is not None:
            return None
        num_eval_samples = min(len(run.data.validation), train.max_generate_samples)
        num_check_prompts = min(config.check_groups, len(run.data.train))
        num_prompts = max(train.rows_per_device_step, num_eval_samples, num_check_prompts)
        max_length = max(len(row.input_ids) for row in (*run.data.train, *run.data.validation))
        group, completion = config.num_generations, config.max_completion_length
        max_rows = max(SamplingOptions.most_rows, group)
        if run.model.device == "cuda":
            tokens = max_length + completion
            max_rows = count_rows_in_memory(run.model.config, run.model.dtype, tokens, memory)
        num_prompts = min(num_prompts, max(1, max_rows // group))
        num_rows = min(num_prompts * group, max_rows)
        return cls(num_prompts, num_rows, max_length, completion)

    def cache_bytes(self, run: Run, *, copies: int) -> int:
        """Returns the bytes of the KV cache, with completions counted `copies` times on a CPU.

        On a GPU, pages are not copied. In float32, `generate` stores a prompt for each completion.
        """
        room, prompts = CACHE_GROWTH, self.prompts
        if run.model.device == "cuda":
            room, copies = PAGE_TOKENS, 1
            prompts = self.rows if run.model.dtype == "float32" else self.prompts
        tokens = prompts * (self.prompt + room) + copies * self.rows * (self.completion + room)
        return tokens * cache_token_bytes(run.model.config, run.model.dtype)

    def prefill_bytes(self, run: Run) -> int:
        """Returns the activation bytes of one layer during the prefill of one batch of prompts."""
        text, value = run.model.config.get_text_config(), DTYPES[run.model.dtype].itemsize
        hidden = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        num_prompts = min(self.prompts, max(1, PREFILL_TOKENS // self.prompt))
        tokens = num_prompts * self.prompt
        if run.model.device == "cuda" and run.model.dtype != "float32":
            tokens = min(tokens, count_prefill_tokens(self.rows))
        mlp_bytes = tokens * (inner * (4 * value + 12) + 4 * hidden * value)
        return int(mlp_bytes + tokens * self.prompt * (2 + value))


def prompt_lengths(run: Run) -> Sequence[int]:
    """Returns the number of tokens of each prompt."""
    return [len(row.input_ids) for row in run.data.train]


def with_completions(run: Run, rows: list[Encoded]) -> list[Encoded]:
    """Returns synthetic completions of each of `rows`, of maximum length."""
    config = run.config.get_section(RlConfig)
    num_generations, tokens = config.num_generations, config.max_completion_length
    return [
        completion
        for row in rows
        for completion in stand_in_completions(row.input_ids, row.row, num_generations, tokens)
    ]


def estimate_sampling_parts(run: Run, size: RolloutSize) -> dict[str, int]:
    """Returns category → bytes that a rollout of `size` needs in addition to the weights."""
    parts = {
        KEYS_AND_VALUES: size.cache_bytes(run, copies=2),
        LOGITS: 4 * LOGITS_COPIES * size.rows * run.model.vocabulary,
        ACTIVATIONS: size.prefill_bytes(run),
    }
    packed = run.model.total_parameters * DTYPES[run.model.dtype].itemsize
    limit = MAX_SHARE * device_memory("cpu")
    if run.model.device == "cpu" and run.model.quant.kind == "none" and packed <= limit:
        parts[PACKED] = packed
    return parts


def estimate_scoring_bytes(run: Run) -> int:
    """Returns the bytes of the weights of teacher and reward models, which stay loaded."""
    device, teacher = run.model.device, run.config.distillation.teacher
    names = [("--teacher", teacher)] if teacher else []
    rewards = run.config.get_section(RlConfig).rewards
    names += [("--reward", spec.name) for spec in rewards if spec.kind == "model"]
    refs = (resolve_model(name, device=device, label=f"{flag} {name}") for flag, name in names)
    return sum(_weight_bytes(ref, run) for ref in refs)


def _weight_bytes(ref: ModelRef, run: Run) -> int:
    model: Any = build_task_model(ref.model_config, ref.auto_class)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = _BYTES_PER_WEIGHT.get(str(ref.quantization.get("kind")))
    return int(num_weights * (weight_bytes or DTYPES[run.model.dtype].itemsize))


def estimate_sampling_seconds(
    run: Run, size: RolloutSize, weights: int, bandwidth: float, flops: float
) -> float:
    """Returns the seconds to sample completions for every prompt once, by a roofline model.

    `weights` are bytes; `bandwidth` (bytes/s) and `flops` (FLOP/s) are what the device attains.
    """
    lengths = prompt_lengths(run)
    group = run.config.get_section(RlConfig).num_generations
    step = run.config.train.rows_per_device_step
    size = replace(size, prompts=min(size.prompts, step), rows=min(size.rows, step * group))
    num_batches = math.ceil(len(lengths) * group / size.rows)
    cache = size.cache_bytes(run, copies=1)
    decode_seconds = num_batches * size.completion * (weights + cache) / bandwidth
    prefill = 2 * run.model.total_parameters * sum(lengths) / flops
    return decode_seconds + prefill


def estimate_rl_time(
    run: Run, gpu: Gpu, size: RolloutSize, operations: float, weights: int
) -> TimeForecast:
    """Returns the time of sampling and training on `gpu`, by a roofline model."""
    flops = PEAK_FRACTION * gpu.tflops * 1e12
    num_prompts = sum(prompt_lengths(run))
    config = run.config.get_section(RlConfig)
    num_completions = len(run.data.train) * config.num_generations * size.completion
    width = getattr(run.model.config.get_text_config(), "hidden_size", 0)
    head = 6 * run.model.vocabulary * width * num_completions
    training = (operations * (num_prompts + num_completions) + head) / flops
    training *= config.num_iterations
    bandwidth = BANDWIDTH_FRACTION * gpu.bandwidth * 1e9
    sampling = estimate_sampling_seconds(run, size, weights, bandwidth, flops)
    seconds = training + sampling
    how = (
        f"a roofline: {PEAK_FRACTION:.0%} of {gpu.tflops:,g} TFLOP/s and {BANDWIDTH_FRACTION:.0%} "
        f"of {gpu.bandwidth:,g} GB/s, not measured"
    )
    return TimeForecast(seconds, num_prompts / seconds, how, sampling_share=sampling / seconds)
