"""How much memory a step needs at its peak, by part and moment.

The step runs on fake tensors (`fake_model`): one micro-batch, the fullest there is, after another,
and the optimizer's update. Layers of a kind add alike, so a model of the first and the last layer,
and one more for each kind k of the n_k layers between them, give the whole:

    peak = peak(first, last) + Σ n_k · (peak(first, k, last) − peak(first, last))

for each moment by itself, since which of them is the highest may change with the depth. Workers
that compute micro-batches in parallel are taken to reach their peaks at once, which is the most.

Which linears of the last block will compute fewer tokens, asked of a small model of its kind.

What reaches the loss is a question about numbers, which a forecast has not: a model of one block
and few words is made with random ones, and the fast step's own check asks it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import QuantConfig, TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.attention.blocked import split_queries
from ftlevel.fast.attention.short import batch_sequences
from ftlevel.fast.checks import PruningCheck
from ftlevel.fast.head.likelihoods import NeededTokens, base_model
from ftlevel.fast.packing import PackedBlocks
from ftlevel.fast.plan import set_packed_attention
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, find_blocks
from ftlevel.models.upstream.fake import packed_tensors
from ftlevel.trained.adapt import apply_method
from ftlevel.training.build_trainer import build_trainer
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    ADAPTER,
    BACKWARD,
    CASTS,
    FIRST_BLOCK,
    FORWARD,
    GRADIENTS,
    LOGITS,
    QUANTIZED,
    UPDATE,
    WEIGHTS,
    WORKSPACE,
    FakeModel,
    LiveBytes,
    build_fake_model,
    describe_blocks,
    targets_in,
    with_layers,
)
from ftlevel.training.memory import set_checkpointing
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.processes import Processes
from ftlevel.training.resume import GoingOn

MOST_PARAMETERS = 120_000_000
"""Of the small model: a block of up to 3B models. Beyond, all tokens are taken to be computed."""

_WORDS = 64


@dataclass(frozen=True)
class Pruning:
    """What the last block of a run need not compute.

    Attributes:
        needed: which tokens it must give; None for all.
        linears: names in the block of those that compute these alone.
    """

    needed: NeededTokens | None = None
    linears: Sequence[str] = ()

    def put_on(self, fast: FastStep, model: Any) -> None:
        """Have the last block of `model` compute as little (mutated)."""
        if self.linears:
            last = find_blocks(base_model(model))[-1]
            fast.prune(self.needed, [last.get_submodule(name) for name in self.linears])


def find_pruning(config: TrainConfig, plan: Plan) -> Pruning:
    """Return what the last block of the model that `plan` trains need not compute."""
    if not (plan.fast.enabled and plan.fast.packs and plan.fast.prunes_last_layer):
        return Pruning()
    last = getattr(plan.model.config.get_text_config(), "num_hidden_layers", 1) - 1
    small = _shrink(plan.model.config, last)
    model = build_task_model(small, plan.model.auto_class)
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        return Pruning()
    own = METHODS[config.method.kind]
    base = replace(
        plan, model=replace(plan.model, config=small, quant=QuantConfig())
    ).base  # a packed weight lets through what the weight lets through
    base = replace(base, targets=targets_in(model, base.targets, [last]))
    model = apply_method(
        model, own.start.default(config.method) if own.start else config.method, base
    )
    model = _with_numbers(model)
    blocks = find_blocks(base_model(model))
    if not blocks or not set_packed_attention(base_model(model)):
        return Pruning()
    packed = PackedBlocks(blocks)
    rows = [_with_few_words(row) for row in plan.data.train[:64]]
    try:
        check = PruningCheck(model, blocks[-1], rows, 0, "cpu", plan.model.dtype)
        needed, linears = check(plan.objective)
    finally:
        packed.remove()
    names = {module: name for name, module in blocks[-1].named_modules()}
    return Pruning(needed, [names[linear] for linear in linears])


def _shrink(config: Any, layer: int) -> Any:
    """Return a copy of a model's `config` with one `layer` of each stack and few words."""
    config = with_layers(config, [layer])
    for owner in (config, config.get_text_config()):
        owner.vocab_size, owner.pad_token_id = _WORDS, 0
    return config


def _with_numbers(model: Any) -> Any:
    """Return `model` on the CPU with small random weights, none of them zero."""
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
                tensor.zero_()  # kinds of tokens
    return model


def _with_few_words(row: Encoded) -> Encoded:
    return replace(row, input_ids=[3 + token % (_WORDS - 3) for token in row.input_ids])


_OF_WORKERS = (ACTIVATIONS, LOGITS, WORKSPACE, CASTS)
"""What each of several workers has of its own."""

_SAMPLED_STEPS = 16
_MOST_ROWS = 20_000  # of which lengths are read

Peaks = Mapping[str, Mapping[str, float]]
"""Moment → part → bytes when most were alive in it."""


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a run.

    Attributes:
        parts: part → bytes at the peak.
        at: the moment of the peak.
        tokens: places of the fullest micro-batch.
        moments: moment → part → bytes at its own peak.
    """

    parts: dict[str, int]
    at: str
    tokens: int
    moments: Peaks = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def forecast_memory(config: TrainConfig, plan: Plan, memory: int) -> MemoryForecast:
    """Return the peak of the bytes of live tensors of the run that `plan` is.

    Args:
        config: the whole configuration.
        plan: its plan, whose rows are those that a step is made of.
        memory: bytes that tensors may take: chunks of scores on a GPU take a share of what is free.
    """
    layers = Layers.of(plan)
    pruning = find_pruning(config, plan)
    batch = _fullest(config, plan, pruning)
    fakes = [build_fake_model(config, plan, some) for some in layers.tried]
    whole = METHODS[config.method.kind].build is None
    held = [_hold_weights(LiveBytes(plan.model.vocabulary), fake, whole=whole) for fake in fakes]
    there = layers.extend([live.peaks for live in held])[FORWARD]
    free = memory - int(sum(there.values())) if plan.model.device == "cuda" else None
    peaks = layers.extend([
        _watch(config, plan, live, fake, batch, pruning=pruning, free=free)
        for fake, live in zip(fakes, held, strict=True)
    ])  # fmt: skip
    for parts in peaks.values():
        for part in _OF_WORKERS:
            parts[part] = parts.get(part, 0) * batch.at_once
    return highest(peaks, batch.tokens)


def highest(peaks: Peaks, tokens: int) -> MemoryForecast:
    """Return the forecast whose moments have `peaks`, in a micro-batch of so many `tokens`."""
    at = max(peaks, key=lambda moment: sum(peaks[moment].values()))
    sizes = {part: round(size) for part, size in peaks[at].items() if size >= 1}
    in_order = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    return MemoryForecast(in_order, at, tokens, peaks)


def count_computed_layers(plan: Plan) -> int:
    """Return how many layers are computed to estimate the memory of `plan`."""
    layers = Layers.of(plan)
    return sum(layers.count if some is None else len(some) for some in layers.tried)


@dataclass(frozen=True)
class Layers:
    """The small models whose memory is computed, and how that of the whole model follows.

    Attributes:
        tried: numbers of the layers of each small model; None for the whole model.
        times: how often the whole model has what each but the first small model has more than the
            first.
        count: layers of a stack; of all stacks where these differ in depth.
    """

    tried: tuple[tuple[int, ...] | None, ...]
    times: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, plan: Plan) -> Layers:
        """Return the small models for the model of `plan`, or that model itself."""
        stacks = describe_blocks(plan)
        if len({len(stack) for stack in stacks}) != 1:
            return cls((None,), (), sum(map(len, stacks)))
        kinds = list(zip(*stacks, strict=True))
        return _by_kind(plan, kinds) or _by_period(kinds) or cls((None,), (), len(kinds))

    @property
    def sample(self) -> dict[int, int] | None:
        """Number of a layer → how many of the whole model are like it; None for the whole model."""
        first = self.tried[0]
        if first is None:
            return None
        found = dict.fromkeys(first, 1)
        for some, times in zip(self.tried[1:], self.times, strict=True):
            more = [at for at in some or () if at not in first]
            total = round(times * len(more))
            found |= {at: len(range(turn, total, len(more))) for turn, at in enumerate(more)}
        return dict(sorted(found.items()))

    def extend(self, computed: Sequence[Peaks]) -> dict[str, dict[str, float]]:
        """Return the peaks of the whole model from those of the small ones."""
        first, *others = computed
        shared = [moment for moment in first if all(moment in other for other in others)]
        return {
            moment: {
                part: first[moment].get(part, 0)
                + sum(
                    times * (other[moment].get(part, 0) - first[moment].get(part, 0))
                    for times, other in zip(self.times, others, strict=True)
                )
                for part in dict.fromkeys(p for each in computed for p in each[moment])
            }
            for moment in shared
        }


def _by_kind(plan: Plan, kinds: Sequence[Any]) -> Layers | None:
    """Return small models of the first and the last layer and one of each kind between them.

    None where that is not less than the whole, or a config cannot describe such a model.
    """
    last = len(kinds) - 1
    between: list[list[int]] = []
    for at in range(1, last):
        alike = next((group for group in between if kinds[group[0]] == kinds[at]), None)
        if alike is None:
            between.append([at])
        else:
            alike.append(at)
    if not between or 2 + 3 * len(between) > len(kinds):
        return None
    tried = ((0, last), *((0, group[0], last) for group in between))
    for some in tried:
        if list(zip(*describe_blocks(plan, some), strict=True)) != [kinds[at] for at in some]:
            return None
    return Layers(tried, tuple(len(group) for group in between), len(kinds))


def _by_period(kinds: Sequence[Any]) -> Layers | None:
    """Return two small models of the first layers, where kinds come again after a few layers."""
    count = len(kinds)
    for first in range(3):
        for period in range(1, 7):
            low = first + period + 1
            if low + period < count and all(
                kinds[at] == kinds[at + period] for at in range(first, count - period)
            ):
                tried = tuple(range(low)), tuple(range(low + period))
                return Layers(tried, ((count - low) / period,), count)
    return None


@dataclass(frozen=True)
class _Batch:
    """What one call of the training step is given.

    Attributes:
        inputs: as the collator gives them, with one micro-batch.
        tokens: places that it computes.
        several: whether others have added to the gradient before.
        at_once: how many like it are computed in parallel.
    """

    inputs: dict[str, Any]
    tokens: int
    several: bool
    at_once: int

    def fresh(self) -> dict[str, Any]:
        """Return the inputs for a step that takes from them what it has used."""
        parts = self.inputs.get("micro_batches")
        copied = {} if parts is None else {"micro_batches": [dict(part) for part in parts]}
        return {**self.inputs, **copied}


def _watch(
    config: TrainConfig,
    plan: Plan,
    live: LiveBytes,
    fake: FakeModel,
    batch: _Batch,
    *,
    pruning: Pruning,
    free: int | None,
) -> Peaks:
    """Return the peaks of a step of `fake`, whose weights `live` holds."""
    here = replace(plan, model=replace(plan.model, device="cpu"))
    if fake.fast is not None:
        pruning.put_on(fake.fast, fake.model)
        if fake.fast.cross_entropy is not None:
            fake.fast.cross_entropy.fit_chunks(free)
    with tempfile.TemporaryDirectory() as nowhere:
        adapted, run = Adapted(fake.model, {}, fake.fast, {}), RunDirectory(Path(nowhere))
        trainer = build_trainer(config, here, adapted, run, GoingOn(), Processes())
    split_queries.cache_clear()  # what is cached from the last depth would be missed in this one
    batch_sequences.cache_clear()
    hooks = _follow(live, trainer)
    fake.model.train()
    set_checkpointing(fake.model, config, here)  # what auto recomputes, a GPU's memory says later
    try:
        with trainer.computing_alone(plan.model.dtype), live:
            _make_states(live, trainer, has_gradients=batch.several)
            live.moment = FORWARD
            trainer.training_step(fake.model, batch.fresh(), 1)  # any count of targets
            live.moment = UPDATE
            trainer.optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peaks


def _hold_weights(live: LiveBytes, fake: FakeModel, *, whole: bool) -> LiveBytes:
    """Count what is there before the first step, and return `live`."""
    for module in (fake.model.get_submodule(name) for name in fake.packed):
        for tensor in packed_tensors(module):
            live.hold(tensor, QUANTIZED)
    for tensor in (*fake.model.parameters(), *fake.model.buffers()):
        if not live.knows(tensor):
            live.hold(tensor, ADAPTER if tensor.requires_grad and not whole else WEIGHTS)
    return live


def _follow(live: LiveBytes, trainer: Any) -> list[Any]:
    """Tell `live` what is a gradient, and when the backward pass begins and nears its end.

    Returns:
        Hooks to remove.
    """
    model, backward = trainer.model, trainer.accelerator.backward

    def begin(*args: Any, **kwargs: Any) -> None:
        live.moment = BACKWARD
        backward(*args, **kwargs)

    def near_end(_: Any, __: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if live.moment == FORWARD and states.requires_grad:
            states.register_hook(lambda _: setattr(live, "moment", FIRST_BLOCK))

    def hold(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.hold(parameter.grad, GRADIENTS)

    trainer.accelerator.backward = begin
    tree = ModuleTree(model)
    stacks = [list(tree.modules[stack].children()) for stack in tree.blocks]
    return [
        *(stack[0].register_forward_hook(near_end) for stack in stacks[:1]),
        *(
            p.register_post_accumulate_grad_hook(hold)
            for p in model.parameters()
            if p.requires_grad
        ),
    ]


def _make_states(live: LiveBytes, trainer: Any, *, has_gradients: bool) -> None:
    """Let the optimizer make what it keeps between steps: it is there from the second one on.

    Args:
        live: is not asked for peaks meanwhile.
        trainer: of the step.
        has_gradients: leave those that micro-batches before this one have made.
    """
    live.begun, live.moment = False, UPDATE
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            live.hold(parameter.grad, GRADIENTS)
    optimizer.step()
    if not has_gradients:
        optimizer.zero_grad()
    live.begun = True


def _fullest(config: TrainConfig, plan: Plan, pruning: Pruning) -> _Batch:
    """Return the micro-batch that computes the most tokens at once, of steps that may come.

    The longest rows are one of these steps, others are drawn at random.
    """
    train, fast = config.train, plan.fast
    rows, size = plan.data.train, train.per_device_train_batch_size
    if not fast.enabled:
        longest = sorted(_some(rows), key=lambda row: -len(row.input_ids))[:size]
        inputs = Collator(plan.model.pad_id)(longest)
        several = train.gradient_accumulation_steps > 1
        return _Batch(inputs, inputs["input_ids"].numel(), several, 1)
    needed = pruning.needed if pruning.linears else None
    collate = StepCollator(
        plan.model.pad_id, replace(fast, shared_prefix=False, needed_tokens=needed)
    )
    found: list[_Batch] = []
    for step in _steps(rows, size * train.gradient_accumulation_steps, train.seed):
        batch = collate(step)
        at_once = fast.workers if batch["in_parallel"] else 1
        parts = batch["micro_batches"]
        costs = [_places(part) for part in parts]
        fullest = parts[costs.index(max(costs))]
        one = {"rows": step, "micro_batches": [fullest], "in_parallel": False}
        found.append(_Batch(one, max(costs), len(parts) > at_once, at_once))
    return max(found, key=lambda batch: (batch.tokens * batch.at_once, batch.several))


def _places(part: Mapping[str, Any]) -> int:
    layout = part.get("layout")
    return int(layout.tokens if layout else part["input_ids"].numel())


def _steps(rows: Sequence[Encoded], size: int, seed: int) -> list[list[Encoded]]:
    """Return the rows of some steps."""
    size = min(size, len(rows))
    draw, some = random.Random(seed), _some(rows)
    some.sort(key=lambda row: -len(row.input_ids))
    longest = some[:size]
    if len(longest[0].input_ids) == len(some[-1].input_ids):
        return [longest]
    drawn = (draw.sample(range(len(rows)), size) for _ in range(_SAMPLED_STEPS))
    return [longest, *([rows[at] for at in step] for step in drawn)]


def _some(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the rows, or so many of a large set as their lengths are soon read of."""
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    apart = len(rows) / _MOST_ROWS
    return [rows[int(at * apart)] for at in range(_MOST_ROWS)]
