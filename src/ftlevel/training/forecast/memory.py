"""Peak memory of a training step on fake tensors, by category (`part`) and phase (`moment`).

    peak = peak(first, last) + Σ n_k · (peak(first, k, last) − peak(first, last))

Each of the n_k layers of type k adds the same, so small models with one layer per type give the
peak of all layers, in each phase. Parallel workers are assumed to peak together, an upper bound.
What can be pruned in the last block depends on values, so one block with random weights is run.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.store import token_counts
from ftlevel.fast.blocked_attention import split_queries
from ftlevel.fast.packed_attention import batch_sequences
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, get_stacks
from ftlevel.models.upstream.tensors import as_gpu
from ftlevel.training.build_trainer import create_trainer
from ftlevel.training.forecast.meta_model import (
    ADAPTER,
    BACKWARD,
    FIRST_BLOCK,
    FORWARD,
    GRADIENTS,
    QUANTIZED,
    TEMPORARY_PARTS,
    UPDATE,
    WEIGHTS,
    FakeModel,
    LiveMemoryTracker,
    create_fake_model,
    select_needed_tokens,
)
from ftlevel.training.memory import set_checkpointing
from ftlevel.training.model import PreparedModel, trainable_parameters
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState

_SAMPLED_STEPS = 16

Peaks = Mapping[str, Mapping[str, float]]
"""Moment → part → bytes at the peak of that moment."""


@dataclass(frozen=True)
class StepMemory:
    """Memory estimate of a training step.

    Attributes:
        parts: category, such as weights or activations → bytes at the peak.
        at: phase in which the peak occurs, such as forward or backward.
        tokens: positions in the largest micro-batch.
        moments: phase → category → bytes at the peak of that phase.
    """

    parts: dict[str, int]
    at: str
    tokens: int
    moments: Peaks = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def estimate_step_memory(run: Run, memory: int) -> StepMemory:
    """Returns an estimate of the peak bytes of all tensors in a training step of `run`.

    `memory` is bytes available to tensors. On a GPU, it limits the chunk size of the logits.
    """
    sample, batch = BlockSample.of(run), _get_largest_batch(run)
    with ExitStack() as stack:
        stack.enter_context(as_gpu(run.model.device == "cuda"))
        models = [stack.enter_context(closing(create_fake_model(run, b))) for b in sample.models]
        trackers = [_track_weights(run, model) for model in models]
        weights = sum(sample.extend([live.peaks for live in trackers])[FORWARD].values())
        available = memory - int(weights) if run.model.device == "cuda" else None
        pairs = zip(models, trackers, strict=True)
        peaks = sample.extend(
            [_simulate_step(run, live, model, batch, available) for model, live in pairs]
        )
    for parts in peaks.values():
        for part in TEMPORARY_PARTS:
            parts[part] = parts.get(part, 0) * batch.num_workers
    batch = replace(batch, memory=memory, weights=int(weights))
    run.hooks.add_memory(run, peaks, batch)
    return get_peak(peaks, batch.tokens)


def get_peak(peaks: Peaks, tokens: int) -> StepMemory:
    """Returns the estimate for the phase with most bytes; `peaks`: phase → category → bytes."""
    at = max(peaks, key=lambda moment: sum(peaks[moment].values()))
    sizes = {part: round(size) for part, size in peaks[at].items() if size >= 1}
    return StepMemory(dict(sorted(sizes.items(), key=lambda item: -item[1])), at, tokens, peaks)


@dataclass(frozen=True)
class BlockSample:
    """Names of blocks whose memory is simulated, to extrapolate the memory of the whole model.

    Attributes:
        ends: first and last block of each stack; all blocks if sampling would not be faster.
        times: each sampled block between them → number n of blocks like it:
            whole = ends + Σ n · (ends and this block − ends).
    """

    ends: tuple[str, ...]
    times: Mapping[str, int]

    @classmethod
    def of(cls, run: Run) -> BlockSample:
        """Returns the blocks to simulate for `run`, one of each kind between the ends.

        Blocks are of one kind, and need equal memory, if parameter shapes, per-layer settings and
        adapted modules are equal.
        """
        model = build_task_model(run.model.config, run.model.auto_class)
        tree, targets = ModuleTree(model), set(run.base.targets)
        settings = [v for v in model.config.get_text_config().to_dict().values() if _is_list(v)]
        ends: list[str] = []
        kinds: dict[str, list[str]] = {}
        names: list[str] = []
        for stack in tree.blocks:
            blocks = list(tree.modules[stack].children())
            names += (own := [f"{stack}.{at}" for at in range(len(blocks))])
            ends += dict.fromkeys((own[0], own[-1]))
            for at, block in enumerate(blocks[1:-1], 1):
                shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
                own_settings = [value[at] for value in settings if len(value) == len(blocks)]
                adapted = [n for n, _ in block.named_modules() if f"{own[at]}.{n}" in targets]
                kind = repr((stack, shapes, own_settings, adapted))
                kinds.setdefault(kind, []).append(own[at])
        sample = cls(tuple(ends), {alike[0]: len(alike) for alike in kinds.values()})
        return sample if kinds and sample.count < len(names) else cls(tuple(names), {})

    @property
    def count(self) -> int:
        """Number of blocks to simulate."""
        return len(self.ends) + len(self.times) * (len(self.ends) + 1)

    @property
    def models(self) -> list[set[str]]:
        """Names of the blocks of each model to simulate."""
        return [set(self.ends), *({*self.ends, name} for name in self.times)]

    def extend(self, computed: Sequence[Peaks]) -> dict[str, dict[str, float]]:
        """Returns the whole model's peaks (phase → category → bytes), given those of `models`."""
        first, *others = computed
        return {
            moment: {
                part: first[moment].get(part, 0)
                + sum(
                    times * (other[moment].get(part, 0) - first[moment].get(part, 0))
                    for times, other in zip(self.times.values(), others, strict=True)
                )
                for part in dict.fromkeys(part for peaks in computed for part in peaks[moment])
            }
            for moment in first
        }


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


@dataclass(frozen=True)
class StepBatch:
    """Inputs of one micro-batch.

    Attributes:
        has_others: whether the step has other micro-batches.
        step_tokens: positions of all micro-batches of the step.
        memory: bytes for tensors on the device, of which weights take `weights`.
    """

    inputs: dict[str, Any]
    tokens: int
    has_others: bool
    num_workers: int
    step_tokens: int
    memory: int = 0
    weights: int = 0

    def copy_inputs(self) -> dict[str, Any]:
        """Returns the inputs with a copy of each micro-batch, which a step changes."""
        batches = self.inputs.get("micro_batches")
        copies = {} if batches is None else {"micro_batches": [dict(part) for part in batches]}
        return {**self.inputs, **copies}


def _simulate_step(
    run: Run,
    tracker: LiveMemoryTracker,
    fake_model: FakeModel,
    batch: StepBatch,
    available: int | None,
) -> Peaks:
    run = replace(run, model=replace(run.model, device="cpu"))
    model, fast = fake_model.model, fake_model.fast
    if fast is not None and fast.cross_entropy is not None:
        fast.cross_entropy.fit_chunks(available)
    with tempfile.TemporaryDirectory() as nowhere:
        prepared, output_dir = PreparedModel(model, {}, fast, {}), RunDirectory(Path(nowhere))
        trainer = create_trainer(run, prepared, output_dir, ResumeState(), Processes())
    split_queries.cache_clear()  # tensors cached for a different depth would not be counted
    batch_sequences.cache_clear()
    _install_hooks(tracker, trainer)
    model.train()
    if run.model.dtype != "float32":  # as accelerate does when training begins
        model.forward = convert_outputs_to_fp32(model.forward)
    set_checkpointing(model, run)  # auto checkpointing is decided later
    with trainer.standalone_steps(run.model.dtype), tracker:
        _create_optimizer_states(tracker, trainer, has_gradients=batch.has_others)
        tracker.moment = FORWARD
        trainer.training_step(model, batch.copy_inputs(), 1)  # any number of targets
        tracker.moment = UPDATE
        trainer.optimizer.step()
    return tracker.peaks


def _track_weights(run: Run, fake_model: FakeModel) -> LiveMemoryTracker:
    tracker = LiveMemoryTracker(run.model.vocabulary)
    is_full = not METHODS[run.config.method.kind].is_adapter
    for tensor in fake_model.quantized:
        tracker.add(tensor, QUANTIZED)
    for tensor in (*fake_model.model.parameters(), *fake_model.model.buffers()):
        if not tracker.has_tensor(tensor):
            tracker.add(tensor, ADAPTER if tensor.requires_grad and not is_full else WEIGHTS)
    return tracker


def _install_hooks(tracker: LiveMemoryTracker, trainer: Any) -> None:
    model, backward = trainer.model, trainer.accelerator.backward

    def begin(*args: Any, **kwargs: Any) -> None:
        tracker.moment = BACKWARD
        backward(*args, **kwargs)

    def on_first_block(_: Any, __: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        if tracker.moment == FORWARD and states.requires_grad:
            states.register_hook(lambda _: setattr(tracker, "moment", FIRST_BLOCK))

    def track(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.add(parameter.grad, GRADIENTS)

    trainer.accelerator.backward = begin
    for stack in get_stacks(model)[:1]:
        stack[0].register_forward_hook(on_first_block)
    for parameter in cast("list[Any]", trainable_parameters(model)):
        parameter.register_post_accumulate_grad_hook(track)


def _create_optimizer_states(
    tracker: LiveMemoryTracker, trainer: Any, *, has_gradients: bool
) -> None:
    tracker.is_counting, tracker.moment = False, UPDATE
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            tracker.add(parameter.grad, GRADIENTS)
    optimizer.step()
    if not has_gradients:
        optimizer.zero_grad()
    tracker.is_counting = True


def _get_largest_batch(run: Run) -> StepBatch:
    train, fast, rows = run.config.train, run.fast, run.data.train
    if not fast.enabled:
        size, lengths = train.per_device_train_batch_size, token_counts(rows)
        longest = np.argsort(-lengths, kind="stable")
        selected, others = longest[:size], longest[size:]
        shorter = others[lengths[others] < lengths.max()]
        if size > 1 and len(shorter):  # rows of one length would need no mask
            selected[-1] = shorter[0]
        batch_rows = run.hooks.with_targets(run, [rows[int(at)] for at in selected])
        inputs = Collator(run.model.pad_id)(batch_rows)
        tokens = inputs["input_ids"].numel()
        return StepBatch(inputs, tokens, train.gradient_accumulation_steps > 1, 1, tokens)
    has_step_loss = run.objective.needs_whole_step
    fast = replace(fast, shared_prefix=False, needed_tokens=select_needed_tokens(run))
    collate = run.hooks.collator(run.model.pad_id, fast)
    candidates: list[StepBatch] = []
    for step in _steps(run, has_step_loss):
        step = run.hooks.with_targets(run, step)
        batch = collate(step)
        num_workers = fast.workers if batch["in_parallel"] else 1
        batches = batch["micro_batches"]
        sizes = [_num_positions(part) for part in batches]
        largest = batches[sizes.index(max(sizes))]
        micro_batch = {"rows": step, "micro_batches": [largest], "in_parallel": False}
        has_others = len(batches) > num_workers
        candidates.append(StepBatch(micro_batch, max(sizes), has_others, num_workers, sum(sizes)))
    if has_step_loss:
        return max(candidates, key=lambda batch: batch.step_tokens)
    return max(candidates, key=lambda batch: (batch.tokens * batch.num_workers, batch.has_others))


def _num_positions(batch: Mapping[str, Any]) -> int:
    layout = batch.get("layout")
    return int(layout.tokens if layout else batch["input_ids"].numel())


def _steps(run: Run, has_step_loss: bool) -> list[list[Encoded]]:
    """Returns rows of random steps; unless `has_step_loss`, a step of the longest rows is first."""
    rows, size = run.data.train, run.config.train.rows_per_device_step
    draw, lengths = random.Random(run.config.train.seed), token_counts(rows)
    longest = np.argsort(-lengths, kind="stable")[:size].tolist()
    steps = [] if has_step_loss else [longest]
    if lengths.min() < lengths.max():
        sets = np.array(run.data.sets or [0] * len(rows))
        groups = [np.flatnonzero(sets == index).tolist() for index in np.unique(sets)]
        steps += [draw.sample(own, min(size, len(own))) for own in groups * _SAMPLED_STEPS]
    return [[rows[at] for at in step] for step in steps or [longest]]
