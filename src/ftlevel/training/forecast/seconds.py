"""Training time.

The time is estimated by a roofline for a named GPU, or from a few real steps on this machine:

    FLOPs per token = 2 N · (1 forward + 1 for inputs + 1 for trained weights + 1 recomputed)
                      + 4 L H T · (1 forward + 2 backward + 1 recomputed), halved if causal
    seconds         = tokens · FLOPs / (PEAK_FRACTION · dense peak)

N counts the weights in matrix products: blocks, and the head where it is computed. The second term
is attention: L layers of hidden size H over T tokens of a row. GPU figures are from data sheets.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from ftlevel.data.encoding.store import row_lengths
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.events import NullListener
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.training.plan.run import Run

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
    if (own := run.hooks.estimate_time(run, gpu, operations, weights)) is not None:
        return own
    seconds = operations * tokens / (PEAK_FRACTION * gpu.tflops * 1e12)
    how = f"a roofline: {PEAK_FRACTION:.0%} of {gpu.tflops:,g} TFLOP/s, not measured"
    return TimeForecast(seconds, tokens / seconds, how)


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

    run = run.hooks.open_run(run)
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
            batch = trainer.collate_step(rows)
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
    # Each timed step samples, and in training only one of `steps_per_batch` steps does.
    repeats = 1 + (run.config.task_section.steps_per_batch - 1) * (1 - sampling / elapsed)
    elapsed, computed = elapsed * repeats, computed * repeats
    tokens_per_s = tokens / elapsed
    seconds = run.data.info["tokens"] / tokens_per_s
    ratio = sampling / elapsed if run.objective.samples else None
    how = f"{NUM_TIMED_STEPS - 1} steps here"
    return TimeForecast(seconds, tokens_per_s, how, tokens / max(computed, 1e-9), ratio)


def _get_step_rows(run: Run, step: int, size: int) -> list[Any]:
    rows = run.data.train
    stride = max(1, len(rows) // (NUM_TIMED_STEPS * size))
    return [
        rows[(step + NUM_TIMED_STEPS * at) * stride % len(rows)]
        for at in range(min(size, len(rows)))
    ]
