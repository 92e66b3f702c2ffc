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
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import QuantConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.fast.blocked_attention import split_queries
from ftlevel.fast.checks import PruningCheck
from ftlevel.fast.likelihoods import TokenSelector, base_model
from ftlevel.fast.packed_attention import batch_sequences
from ftlevel.fast.packing import PackedModel
from ftlevel.fast.plan import set_packed_attention
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, get_blocks
from ftlevel.models.upstream.fake import packed_tensors
from ftlevel.models.upstream.tensors import as_gpu
from ftlevel.trained.adapt import apply_method
from ftlevel.training.build_trainer import create_trainer
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    CASTS,
    FIRST_BLOCK,
    FORWARD,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    QUANTIZED,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
    FakeModel,
    LiveMemoryTracker,
    create_fake_model,
    get_block_signatures,
    targets_in,
    with_layers,
)
from ftlevel.training.memory import set_checkpointing
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState

MAX_PARAMETERS = 120_000_000
"""Largest one-block model built to find pruning, as for models up to 3B parameters. Beyond, all
tokens of the last block are assumed to be computed."""

_WORDS = 64


@dataclass(frozen=True)
class Pruning:
    """Last-layer pruning: `linears` compute only tokens that `needed` selects (None: all)."""

    needed: TokenSelector | None = None
    linears: Sequence[str] = ()

    def apply_to(self, fast: FastStep, model: Any) -> None:
        """Restrict the last block of `model` (modified) to the needed tokens."""
        if self.linears:
            last = get_blocks(base_model(model))[-1]
            fast.prune(self.needed, [last.get_submodule(name) for name in self.linears])


def get_pruning(run: Run) -> Pruning:
    """Returns how the last block of `run` can be pruned; empty if all tokens are computed."""
    if not (run.fast.enabled and run.fast.packs and run.fast.prunes_last_layer):
        return Pruning()
    last = getattr(run.model.config.get_text_config(), "num_hidden_layers", 1) - 1
    small = _shrink(run.model.config, last)
    model = build_task_model(small, run.model.auto_class)
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        return Pruning()
    method = METHODS[run.config.method.kind]
    base = replace(
        run, model=replace(run.model, config=small, quant=QuantConfig())
    ).base  # quantization does not change which tokens reach the loss
    base = replace(base, targets=targets_in(model, base.targets, [last]))
    model = apply_method(model, method.initialization.without_weights(run.config.method), base)
    model = _with_random_weights(model)
    blocks = get_blocks(base_model(model))
    if not blocks or not set_packed_attention(base_model(model)):
        return Pruning()
    packing = PackedModel(base_model(model))
    rows = [_with_small_vocabulary(row) for row in run.data.train[:64]]
    try:
        check = PruningCheck(model, blocks[-1], rows, 0, "cpu", run.model.dtype)
        needed, linears = check(run.objective)
    finally:
        packing.remove()
    names = {module: name for name, module in blocks[-1].named_modules()}
    return Pruning(needed, [names[linear] for linear in linears])


def _shrink(config: Any, layer: int) -> Any:
    """Returns `config` with a small vocabulary and only layer `layer` of encoder and decoder."""
    config = with_layers(config, [layer])
    for owner in (config, config.get_text_config()):
        owner.vocab_size, owner.pad_token_id = _WORDS, 0
    return config


def _with_random_weights(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = model.to_empty(device="cpu").float()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.5 if tensor.dim() < 2 else 0.0, 0.05, generator=generator)
        for name, tensor in model.named_buffers():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0, generator=generator)
            elif name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
            else:
                tensor.zero_()  # token type ids
    return model


def _with_small_vocabulary(row: Encoded) -> Encoded:
    return replace(row, input_ids=[3 + token % (_WORDS - 3) for token in row.input_ids])


_WORKER_PARTS = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS)
"""Parts that each parallel worker allocates for itself."""
PERSISTENT_PARTS = (WEIGHTS, QUANTIZED, ADAPTER, OPTIMIZER)
"""Parts that stay between steps."""

_SAMPLED_STEPS = 16
_MAX_ROWS = 20_000  # rows whose lengths are read

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
    layers = LayerSample.of(run)
    pruning = get_pruning(run)
    batch = _get_largest_batch(run, pruning)
    is_full = not METHODS[run.config.method.kind].is_adapter
    with ExitStack() as stack:
        stack.enter_context(as_gpu(run.model.device == "cuda"))
        fake_models = [
            stack.enter_context(closing(create_fake_model(run, some))) for some in layers.samples
        ]
        trackers = [
            _track_weights(LiveMemoryTracker(run.model.vocabulary), fake, is_full=is_full)
            for fake in fake_models
        ]
        weights = layers.extend([live.peaks for live in trackers])[FORWARD]
        available = memory - int(sum(weights.values())) if run.model.device == "cuda" else None
        peaks = layers.extend(
            [
                _simulate_step(run, live, fake, batch, pruning=pruning, available=available)
                for fake, live in zip(fake_models, trackers, strict=True)
            ]
        )
    for parts in peaks.values():
        for part in _WORKER_PARTS:
            parts[part] = parts.get(part, 0) * batch.num_workers
    batch = replace(batch, memory=memory, weights=int(sum(weights.values())))
    run.hooks.add_memory(run, peaks, batch)
    return get_peak(peaks, batch.tokens)


def get_peak(peaks: Peaks, tokens: int) -> StepMemory:
    """Returns the estimate for the phase with most bytes; `peaks`: phase → category → bytes."""
    at = max(peaks, key=lambda moment: sum(peaks[moment].values()))
    sizes = {part: round(size) for part, size in peaks[at].items() if size >= 1}
    return StepMemory(dict(sorted(sizes.items(), key=lambda item: -item[1])), at, tokens, peaks)


def count_computed_layers(run: Run) -> int:
    """Returns how many layers the memory estimate of `run` must simulate."""
    layers = LayerSample.of(run)
    return sum(layers.count if sample is None else len(sample) for sample in layers.samples)


@dataclass(frozen=True)
class LayerSample:
    """Small models whose memory is simulated, to extrapolate the memory of the whole model.

    Attributes:
        samples: layer indices of each small model; None is the whole model.
        times: factor f of each model but the first: whole = first + Σ f · (model − first).
        count: layers of the whole model; per stack if encoder and decoder have equally many.
    """

    samples: tuple[tuple[int, ...] | None, ...]
    times: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, run: Run) -> LayerSample:
        """Returns the small models to simulate for `run`; the whole model if none represent it."""
        stacks = get_block_signatures(run)
        if len({len(stack) for stack in stacks}) != 1:
            return cls((None,), (), sum(map(len, stacks)))
        layer_types = list(zip(*stacks, strict=True))
        return _sample_by_type(run, layer_types) or cls((None,), (), len(layer_types))

    @property
    def sample(self) -> dict[int, int] | None:
        """Index of each simulated layer → number of layers it stands for; None: whole model."""
        first = self.samples[0]
        if first is None:
            return None
        num_layers = dict.fromkeys(first, 1)
        for some, times in zip(self.samples[1:], self.times, strict=True):
            new_layers = [at for at in some or () if at not in first]
            total = round(times * len(new_layers))
            num_layers |= {
                at: len(range(turn, total, len(new_layers))) for turn, at in enumerate(new_layers)
            }
        return dict(sorted(num_layers.items()))

    def extend(self, computed: Sequence[Peaks]) -> dict[str, dict[str, float]]:
        """Returns the whole model's peaks (phase → category → bytes), given the small models'."""
        first, *others = computed
        shared = [moment for moment in first if all(moment in other for other in others)]
        return {
            moment: {
                part: first[moment].get(part, 0)
                + sum(
                    times * (other[moment].get(part, 0) - first[moment].get(part, 0))
                    for times, other in zip(self.times, others, strict=True)
                )
                for part in dict.fromkeys(p for peaks in computed for p in peaks[moment])
            }
            for moment in shared
        }


def _sample_by_type(run: Run, layer_types: Sequence[Any]) -> LayerSample | None:
    """Returns small models: first, last and one layer per type; None if slower or impossible."""
    last = len(layer_types) - 1
    between: list[list[int]] = []
    for at in range(1, last):
        alike = next((group for group in between if layer_types[group[0]] == layer_types[at]), None)
        if alike is None:
            between.append([at])
        else:
            alike.append(at)
    if not between or 2 + 3 * len(between) > len(layer_types):
        return None
    samples = ((0, last), *((0, group[0], last) for group in between))
    for some in samples:
        if list(zip(*get_block_signatures(run, some), strict=True)) != [
            layer_types[at] for at in some
        ]:
            return None
    return LayerSample(samples, tuple(len(group) for group in between), len(layer_types))


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
    *,
    pruning: Pruning,
    available: int | None,
) -> Peaks:
    cpu_run = replace(run, model=replace(run.model, device="cpu"))
    if fake_model.fast is not None:
        pruning.apply_to(fake_model.fast, fake_model.model)
        if fake_model.fast.cross_entropy is not None:
            fake_model.fast.cross_entropy.fit_chunks(available)
    with tempfile.TemporaryDirectory() as nowhere:
        model = PreparedModel(fake_model.model, {}, fake_model.fast, {})
        output_dir = RunDirectory(Path(nowhere))
        trainer = create_trainer(cpu_run, model, output_dir, ResumeState(), Processes())
    split_queries.cache_clear()  # tensors cached for a different depth would not be counted
    batch_sequences.cache_clear()
    hooks = _install_hooks(tracker, trainer)
    model.model.train()
    if run.model.dtype != "float32":  # as accelerate does when training begins
        model.model.forward = convert_outputs_to_fp32(model.model.forward)
    set_checkpointing(fake_model.model, cpu_run)  # auto checkpointing is decided later
    try:
        with trainer.standalone_steps(run.model.dtype), tracker:
            _create_optimizer_states(tracker, trainer, has_gradients=batch.has_others)
            tracker.moment = FORWARD
            trainer.training_step(fake_model.model, batch.copy_inputs(), 1)  # any number of targets
            tracker.moment = UPDATE
            trainer.optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return tracker.peaks


def _track_weights(
    tracker: LiveMemoryTracker, fake_model: FakeModel, *, is_full: bool
) -> LiveMemoryTracker:
    for module in (fake_model.model.get_submodule(name) for name in fake_model.packed):
        for tensor in packed_tensors(module):
            tracker.add(tensor, QUANTIZED)
    for tensor in (*fake_model.model.parameters(), *fake_model.model.buffers()):
        if not tracker.has_tensor(tensor):
            tracker.add(tensor, ADAPTER if tensor.requires_grad and not is_full else WEIGHTS)
    return tracker


def _install_hooks(tracker: LiveMemoryTracker, trainer: Any) -> list[Any]:
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
    tree = ModuleTree(model)
    stacks = [list(tree.modules[stack].children()) for stack in tree.blocks]
    return [
        *(stack[0].register_forward_hook(on_first_block) for stack in stacks[:1]),
        *(
            p.register_post_accumulate_grad_hook(track)
            for p in model.parameters()
            if p.requires_grad
        ),
    ]


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


def _get_largest_batch(run: Run, pruning: Pruning) -> StepBatch:
    train, fast = run.config.train, run.fast
    rows, size = run.data.train, train.per_device_train_batch_size
    if not fast.enabled:
        by_length = sorted(_sample_rows(rows), key=lambda row: -len(row.input_ids))
        batch_rows, longest = by_length[:size], len(by_length[0].input_ids)
        shorter = [row for row in by_length[size:] if len(row.input_ids) < longest]
        if size > 1 and shorter:  # rows of one length would need no mask
            batch_rows[-1] = shorter[0]
        batch_rows = run.hooks.with_targets(run, batch_rows)
        inputs = Collator(run.model.pad_id)(batch_rows)
        has_others = train.gradient_accumulation_steps > 1
        tokens = inputs["input_ids"].numel()
        return StepBatch(inputs, tokens, has_others, 1, tokens)
    needed_tokens = pruning.needed if pruning.linears else None
    has_step_loss = run.objective.needs_whole_step
    collate = run.hooks.collator(
        run.model.pad_id, replace(fast, shared_prefix=False, needed_tokens=needed_tokens)
    )
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
    rows, train = run.data.train, run.config.train
    draw, sample = random.Random(train.seed), _sample_rows(rows)
    sample.sort(key=lambda row: -len(row.input_ids))
    longest_rows = sample[: train.rows_per_device_step]
    if len(longest_rows[0].input_ids) == len(sample[-1].input_ids):
        return [longest_rows]
    sets = np.array(run.data.sets or [0] * len(rows))
    groups = [np.flatnonzero(sets == index).tolist() for index in np.unique(sets)]
    steps = [
        [rows[at] for at in draw.sample(own, min(train.rows_per_device_step, len(own)))]
        for own in groups
        for _ in range(_SAMPLED_STEPS)
    ]
    return steps if has_step_loss else [longest_rows, *steps]


def _sample_rows(rows: Sequence[Encoded]) -> list[Encoded]:
    if len(rows) <= _MAX_ROWS:
        return list(rows)
    stride = len(rows) / _MAX_ROWS
    return [rows[int(at * stride)] for at in range(_MAX_ROWS)]
