"""Training time, and memory and time of the rollouts of `--task rl` and of the scoring models.

The time is estimated by a roofline for a named GPU, or from a few real steps on this machine:

    FLOPs per token = 2 N · (1 forward + 1 for inputs + 1 for trained weights + 1 recomputed)
                      + 4 L H T · (1 forward + 2 backward + 1 recomputed), halved if causal
    seconds         = tokens · FLOPs / (PEAK_FRACTION · dense peak)

N counts the weights in matrix products: blocks, and the head where it is computed. The second term
is attention: L layers of hidden size H over T tokens of a row. GPU figures are from data sheets.
For rollouts:

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
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import row_lengths
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.evaluation.decoding import CACHE_GROWTH
from ftlevel.evaluation.packed_weights import MAX_SHARE
from ftlevel.events import NullListener
from ftlevel.extras.rl.config import RL_TASK
from ftlevel.extras.rl.paged_sampling import (
    LOGITS_COPIES,
    PAGE_TOKENS,
    cache_token_bytes,
    count_prefill_tokens,
    count_rows_in_memory,
)
from ftlevel.extras.rl.rollouts import open_rewards
from ftlevel.extras.rl.rows import stand_in_completions
from ftlevel.extras.rl.sampling import PREFILL_TOKENS, SamplingOptions
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES, device_memory
from ftlevel.models.loading import build_task_model
from ftlevel.objectives import PolicyObjective
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model
from ftlevel.training.forecast.meta_model import ACTIVATIONS, LOGITS
from ftlevel.training.plan.run import Run

KEYS_AND_VALUES = "keys and values"
PACKED = "packed weights"
SCORING_MODELS = "teacher and reward models"
SAMPLING = "sampling"
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
        config, train = run.config.rl, run.config.train
        if run.config.task != RL_TASK or config.rollouts is not None:
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
    """Returns `rows`, or for `--task rl` synthetic completions of each, of maximum length."""
    if run.config.task != RL_TASK:
        return rows
    num_generations, tokens = run.config.rl.num_generations, run.config.rl.max_completion_length
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
    if run.config.task != RL_TASK:
        return 0
    device, teacher = run.model.device, run.config.distillation.teacher
    names = [("--teacher", teacher)] if teacher else []
    names += [("--reward", spec.name) for spec in run.config.rl.rewards if spec.kind == "model"]
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
    group, step = run.config.rl.num_generations, run.config.train.rows_per_device_step
    size = replace(size, prompts=min(size.prompts, step), rows=min(size.rows, step * group))
    num_batches = math.ceil(len(lengths) * group / size.rows)
    cache = size.cache_bytes(run, copies=1)
    decode_seconds = num_batches * size.completion * (weights + cache) / bandwidth
    prefill = 2 * run.model.total_parameters * sum(lengths) / flops
    return decode_seconds + prefill


GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes of memory, dense bfloat16 TFLOP/s, GB/s of memory; 0 if unknown."""

    name: str
    memory: int
    tflops: float = 0.0
    bandwidth: float = 0.0


GPUS = {
    "h200": Gpu("H200 SXM", 141 * GIB, 989, 4800),
    "h100": Gpu("H100 SXM", 80 * GIB, 989, 3350),
    "h100-pcie": Gpu("H100 PCIe", 80 * GIB, 756, 2000),
    "a100": Gpu("A100 80 GB SXM", 80 * GIB, 312, 2039),
    "a100-40gb": Gpu("A100 40 GB", 40 * GIB, 312, 1555),
    "l40s": Gpu("L40S", 48 * GIB, 362, 864),
    "a6000": Gpu("RTX A6000", 48 * GIB, 155, 768),
    "a10": Gpu("A10", 24 * GIB, 125, 600),
    "l4": Gpu("L4", 24 * GIB, 121, 300),
    "rtx4090": Gpu("RTX 4090", 24 * GIB, 165, 1008),
    "rtx3090": Gpu("RTX 3090", 24 * GIB, 71, 936),
    "t4": Gpu("T4", 16 * GIB, 65, 320),
}
"""From data sheets; the T4 has no bfloat16, so its figure is for float16."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)")


def parse_gpu(text: str) -> Gpu:
    """Returns the GPU of a name such as `h100`, or of a size such as `24GB`; else ConfigError."""
    name = text.strip().lower().replace(" ", "-").replace("_", "-")
    if name in GPUS:
        return GPUS[name]
    if size := _SIZE.fullmatch(name):
        return Gpu(f"a GPU of {size[1]} GiB", int(float(size[1]) * GIB))
    raise ConfigError(
        f"--gpu {text}: unknown GPU.{did_you_mean(name, GPUS)} Known: "
        f"{join_names(GPUS)}. Or give its memory: --gpu 24GB."
    )


PEAK_FRACTION = 0.4
"""Assumed fraction of the peak FLOP/s that a step reaches: NeMo AutoModel reaches 0.41 with LoRA on
Llama-3-8B on an H100 (docs/plan.md). ftlevel itself was not measured on a GPU."""

BANDWIDTH_FRACTION = 0.5
"""Assumed fraction of the memory bandwidth that decoding reaches; not measured."""

NUM_TIMED_STEPS = 5
"""Steps of a probe; the first is a warm-up and is not counted."""


@dataclass(frozen=True)
class TimeForecast:
    """Estimated training time without evaluation and saving.

    Attributes:
        tokens_per_s: in reinforcement learning, tokens of prompts.
        how: description of the method of estimation.
        tokens_per_cpu_s: tokens per second of CPU time of all threads, which other processes do not
            distort.
        sampling_share: fraction of the time spent on sampling and rewards.
    """

    seconds_per_epoch: float
    tokens_per_s: float
    how: str
    tokens_per_cpu_s: float | None = None
    sampling_share: float | None = None


def count_operations(run: Run) -> float:
    """Returns the mean FLOPs per token of a training step of `run`."""
    text, info = run.model.config.get_text_config(), run.data.info
    recomputes = run.config.train.recomputes
    width = getattr(text, "hidden_size", 0) or 0
    layers = getattr(text, "num_hidden_layers", 0) or 0
    head_size = run.model.vocabulary * width
    ratio = min(1.0, info["supervised"] / max(1, info["tokens"]))
    lengths = row_lengths(run.data.train).astype(float)
    seen = (lengths**2).sum() / lengths.sum() / (2 if run.model.kind == "decoder" else 1)
    attention = 4 * layers * width * seen
    per_row = run.objective.per_row
    head = 0.0 if per_row else 2 * head_size * ratio
    # Embeddings need no products; an untied head is counted separately.
    embeddings = head_size * (1 if per_row or getattr(text, "tie_word_embeddings", True) else 2)
    matmuls = 2 * max(run.model.total_parameters - embeddings, 0)
    trains_base = METHODS[run.config.method.kind].trains_base(run.config.method)
    return (
        matmuls * (2 + trains_base + recomputes)
        + attention * (3 + recomputes)
        + head * (2 + trains_base)
    )


def estimate_time(run: Run, gpu: Gpu) -> TimeForecast | None:
    """Returns the training time on `gpu`; None if the speed of `gpu` is unknown."""
    if not gpu.tflops:
        return None
    tokens = run.data.info["tokens"]
    operations = count_operations(run)
    weights = run.model.total_parameters * DTYPES[run.model.dtype].itemsize
    if (size := RolloutSize.of(run, gpu.memory - weights)) is not None:
        return _estimate_rl_time(run, gpu, size, operations, weights)
    seconds = operations * tokens / (PEAK_FRACTION * gpu.tflops * 1e12)
    how = f"a roofline: {PEAK_FRACTION:.0%} of {gpu.tflops:,g} TFLOP/s, not measured"
    return TimeForecast(seconds, tokens / seconds, how)


def _estimate_rl_time(
    run: Run, gpu: Gpu, size: RolloutSize, operations: float, weights: int
) -> TimeForecast:
    flops = PEAK_FRACTION * gpu.tflops * 1e12
    num_prompts = sum(prompt_lengths(run))
    num_completions = len(run.data.train) * run.config.rl.num_generations * size.completion
    width = getattr(run.model.config.get_text_config(), "hidden_size", 0)
    head = 6 * run.model.vocabulary * width * num_completions
    training = (operations * (num_prompts + num_completions) + head) / flops
    training *= run.config.steps_per_rollout
    bandwidth = BANDWIDTH_FRACTION * gpu.bandwidth * 1e9
    sampling = estimate_sampling_seconds(run, size, weights, bandwidth, flops)
    seconds = training + sampling
    how = (
        f"a roofline: {PEAK_FRACTION:.0%} of {gpu.tflops:,g} TFLOP/s and {BANDWIDTH_FRACTION:.0%} "
        f"of {gpu.bandwidth:,g} GB/s, not measured"
    )
    return TimeForecast(seconds, num_prompts / seconds, how, sampling_share=sampling / seconds)


def measure_time(run: Run) -> TimeForecast:
    """Returns the training time on this machine, extrapolated from a few training steps."""
    import tempfile
    from pathlib import Path

    import torch

    from ftlevel.artifacts.run_directory import RunDirectory
    from ftlevel.training.build_trainer import create_trainer
    from ftlevel.training.gradients import are_finite
    from ftlevel.training.model import load_training_model
    from ftlevel.training.processes import Processes
    from ftlevel.training.resume import ResumeState

    is_rl = isinstance(run.objective, PolicyObjective)
    if is_rl and run.config.rl.reward:
        rows, where, model = run.data.train, run.data.table.where, run.model
        rewards = open_rewards(run.config.rl, model.device, model.tokenizer, rows, where)
        run = replace(run, rewards=rewards)
    model_state = load_training_model(run, NullListener())
    with tempfile.TemporaryDirectory() as nowhere:
        output_dir = RunDirectory(Path(nowhere))
        trainer = create_trainer(run, model_state, output_dir, ResumeState(), Processes())
    size = run.config.train.rows_per_device_step
    optimizer: Any = trainer.create_optimizer()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    model_state.model.train()
    elapsed, computed, tokens, sampling = 0.0, 0.0, 0, 0.0
    with trainer.standalone_steps(run.model.dtype):
        for step in range(NUM_TIMED_STEPS):
            rows = _get_step_rows(run, step, size)
            start, cpu_start = time.perf_counter(), time.process_time()
            batch = {"prompts": rows} if is_rl else trainer.data_collator(rows)
            trainer.prepare_step([batch], trainer.args.device)
            sampled = time.perf_counter() - start
            num_targets = trainer.count_targets([batch], trainer.args.device)
            trainer.training_step(model_state.model, batch, num_targets)
            are_finite(weight.grad for weight in trained)  # as in training
            if trainer.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
            optimizer.step()
            are_finite(trained)
            optimizer.zero_grad()
            if step:
                elapsed += time.perf_counter() - start
                computed += time.process_time() - cpu_start
                sampling += sampled
                tokens += sum(len(row.input_ids) for row in rows)
    # Each timed step samples, and in training only one of `steps_per_rollout` steps does.
    repeats = 1 + (run.config.steps_per_rollout - 1) * (1 - sampling / elapsed)
    elapsed, computed = elapsed * repeats, computed * repeats
    tokens_per_s = tokens / elapsed
    seconds = run.data.info["tokens"] / tokens_per_s
    ratio = sampling / elapsed if is_rl else None
    how = f"{NUM_TIMED_STEPS - 1} steps here"
    return TimeForecast(seconds, tokens_per_s, how, tokens / max(computed, 1e-9), ratio)


def _get_step_rows(run: Run, step: int, size: int) -> list[Any]:
    rows = run.data.train
    stride = max(1, len(rows) // (NUM_TIMED_STEPS * size))
    return [
        rows[(step + NUM_TIMED_STEPS * at) * stride % len(rows)]
        for at in range(min(size, len(rows)))
    ]
