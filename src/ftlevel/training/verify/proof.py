"""Whether the fast step is the plain one: a few rows before every run, whole steps when asked.

In float32 the two differ by the order of their sums and nothing else, so a fault of a thousandth
is seen where bfloat16 would hide one of twenty. How much an order does is measured: the plain step
with other rounding errors against the plain step. In the run's precision a step that
is right is no farther from float32 than the plain step is, which is measured too.

The whole model in float32 or float64 for a moment, where there is memory for it.

The few rows on which every run compares its steps.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.encoding.fit import prompt_length
from ftlevel.errors import RunError
from ftlevel.evaluation.scoring import batches
from ftlevel.events import Listener
from ftlevel.fast.plan import find_randomness
from ftlevel.methods import METHODS
from ftlevel.models.hardware import free_memory_bytes
from ftlevel.models.upstream.tensors import inner_tensors, own_tensors
from ftlevel.training.build_trainer import build_trainer
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.processes import Processes
from ftlevel.training.resume import GoingOn
from ftlevel.training.shards import is_sharded
from ftlevel.training.verify.bounds import (
    KINK,
    Apart,
    Bounds,
    Rounding,
    Verified,
    added,
    compare_gradients,
    total,
)
from ftlevel.training.verify.steps import Computed, Steps, moved_from_start

NARROW = (torch.bfloat16, torch.float16)
COPIES = 4
"""Tensors as large as what is trained that a comparison holds: two gradients, where it began, and
one that is on its way."""


@contextlib.contextmanager
def whole_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Hold every narrow weight of `model` in float32 inside the block, and the same ones after it.

    Unlike `evaluation.two_models.float32`, which widens a module while it runs, this serves a
    backward pass, threads, and functions that read the weight of a module they do not call.
    Quantized weights stay as they are, and are dequantized to float32.
    """
    dtypes = [(*what, getattr(*what)) for what in _dtypes_of_4_bits(model)]
    for owner, name, _ in dtypes:
        setattr(owner, name, torch.float32)
    try:
        with _held_in(torch.float32, _tensors_of(model, NARROW)):
            yield
    finally:
        for owner, name, dtype in dtypes:
            setattr(owner, name, dtype)


@contextlib.contextmanager
def whole_in_float64(model: torch.nn.Module) -> Iterator[None]:
    """Hold every weight of `model`, which is in float32, in float64 inside the block.

    What transformers computes in float32 whatever the weights are, such as a norm's mean of
    squares, stays so.
    """
    with _held_in(torch.float64, _tensors_of(model, (torch.float32,))):
        yield


@contextlib.contextmanager
def _held_in(dtype: torch.dtype, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Hold `tensors` in `dtype` inside the block, and the values that they had after it."""
    held = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in held:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def fits_in_float32(model: torch.nn.Module, device: str) -> bool:
    """Whether `model`, and what comparing its gradients takes, can be held in float32 beside it.

    One that is shared out over processes cannot: FSDP2 gathers the parts that it was given.
    """
    if is_sharded(model):
        return False
    return _fits(model, torch.float32, _tensors_of(model, NARROW), device)


def fits_in_float64(model: torch.nn.Module, device: str) -> bool:
    """Whether `model`, which is in float32, can be held in float64 on `device`, and computed in.

    One with quantized weights cannot: nothing dequantizes them to it.
    """
    wide = _tensors_of(model, (torch.float32,))
    others = {id(tensor) for tensor in model.parameters()} - {id(tensor) for tensor in wide}
    if others or device == "mps":
        return False
    return _fits(model, torch.float64, wide, device)


def _fits(
    model: torch.nn.Module, dtype: torch.dtype, tensors: list[torch.Tensor], device: str
) -> bool:
    """Whether there is memory for `tensors` of `model` in `dtype`, and to compare gradients."""
    wide = sum(tensor.numel() for tensor in tensors)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dtype.itemsize * (wide + COPIES * trained) < free_memory_bytes(device) // 2


def _tensors_of(model: torch.nn.Module, dtypes: tuple[torch.dtype, ...]) -> list[torch.Tensor]:
    """Return the parameters and buffers of `dtypes`, each once; none that is quantized."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for own in own_tensors(module):
            for tensor in own.values():
                if tensor is not None and tensor.dtype in dtypes and not inner_tensors(tensor):
                    found[id(tensor)] = tensor
    return list(found.values())


def _dtypes_of_4_bits(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """Return whose attribute says what 4-bit linears and experts dequantize to and compute in."""
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        for tensor in own_tensors(module)[0].values():
            if (state := getattr(tensor, "quant_state", None)) is not None:
                found.append((state, "dtype"))
                found += [(module, "compute_dtype")] * hasattr(module, "compute_dtype")
    return found


FEW_TOKENS = 256
"""Two short rows, or a few: what costs less than one step of most runs."""
FEW_ROWS = 4
LOOKED_AT = 64
LONGEST = 1_024
"""A row that cannot be cut is left out where it is longer."""


def choose_few(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the shortest of the first rows, cut where that can be, or none if all are long."""
    first = [short for row in rows[:LOOKED_AT] if (short := shorten(row, FEW_TOKENS // 2))]
    chosen: list[Encoded] = []
    tokens = 0
    for row in sorted(first, key=lambda row: len(row.input_ids)):
        tokens += len(row.input_ids)
        if len(chosen) >= 2 and (tokens > FEW_TOKENS or len(chosen) == FEW_ROWS):
            break
        chosen.append(row)
    return chosen


def shorten(row: Encoded, size: int) -> Encoded | None:
    """Return `row` with `size` tokens at most, or as it is; None if it is long and cannot be cut.

    A row with a label a token is cut to what leads to its last target; one with a number to learn
    to its beginning. Others, such as spans, have labels that count tokens.
    """
    length = len(row.input_ids)
    if length <= size:
        return row
    labels = row.labels
    if len(row.branches) > 1:  # answers stay whole, and so does what tells them apart
        surplus = min(length - size, (prompt_length(row) or 1) - 1)
        return row.without(surplus) if surplus > 0 and length - surplus <= LONGEST else None
    if isinstance(labels, list) and len(labels) == length:
        end = max((at + 1 for at, label in enumerate(labels) if label != IGNORED), default=length)
        kept = slice(max(0, end - size), max(end, size))
        labels = labels[kept]
    elif isinstance(labels, int | float):
        kept = slice(0, size)
    else:
        return row if length <= LONGEST else None
    extras = {name: values[kept] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[kept], labels=labels, extras=extras)


class _NotFiniteError(Exception):
    """The plain step has no loss."""


STEPS = 3
"""Steps that are compared when it is asked for."""


def verify_step(
    config: TrainConfig, plan: Plan, adapted: Adapted, listener: Listener
) -> Verified | None:
    """Compare the fast step with the plain one before training; nothing of it is left behind.

    Args:
        config: the whole configuration: `speed.verify` asks for whole steps, or for nothing.
        plan: of the run.
        adapted: its model, with the fast step on it.
        listener: told what was found.

    Returns:
        How far apart they are; None where nothing was compared.

    Raises:
        RunError: farther than rounding explains.
    """
    asked, rows = config.speed.verify, plan.data.train
    if adapted.fast is None or asked is False:
        return None
    if is_sharded(adapted.model) and METHODS[config.method.kind].build is None:
        why = "the trained weights are shared out over the processes"
        listener.choices("verify-fast", [Choice("fast step", "not compared with the plain", why)])
        return None
    a_batch = config.train.per_device_train_batch_size
    a_step = a_batch * config.train.gradient_accumulation_steps
    few = [] if asked else choose_few(rows)
    if not asked and not few:
        return None
    if asked:
        listener.stage("compute the first steps the plain way and the fast way")
    with tempfile.TemporaryDirectory() as nowhere:
        nobody = RunDirectory(Path(nowhere))
        trainer = build_trainer(config, plan, adapted, nobody, GoingOn(), Processes())
        steps = Steps(trainer, plan.model.pad_id)
        dropout = bool(asked and find_randomness(config, adapted.model, with_head=True))
        verifier = _Verifier(steps, a_batch if asked else len(few), plan.model.dtype, dropout)
        wanted = list(batches(rows[: STEPS * a_step], a_step)) if asked else [few]
        # On a GPU the kernels of half precision are others than those of float32.
        rounded = bool(asked) or plan.model.device != "cpu"
        try:
            verified = verifier.compare(wanted, rounded=rounded, rate=plan.schedule.learning_rate)
        except _NotFiniteError:  # the run stops at its first step, and says where
            return None
    what = (
        f"fast step verified on {verified.steps} steps"
        if asked
        else f"fast step verified on {verified.rows} rows"
    )
    apart = f"loss differs by {verified.loss:.1e}, gradients by {verified.gradient:.1e}, relative"
    if verified.exact is not None:
        apart += f", to the plain step in float64, from which its own are {verified.exact:.1e}"
        apart += "; both in float64, since rounding moves one over a kink" * verified.kinks
    listener.choices("verify-fast", [Choice(what, f"in {verified.dtype}, {apart}")])
    return verified


@dataclass(frozen=True)
class _Verifier:
    """Compares steps and raises where they are not the same.

    Attributes:
        steps: computes them.
        batch_size: rows of a batch of the plain step.
        dtype: the run's precision.
        dropout: whether something is dropped at random, to be compared too.
    """

    steps: Steps
    batch_size: int
    dtype: str
    dropout: bool

    def compare(
        self, wanted: Sequence[Sequence[Encoded]], *, rounded: bool, rate: float
    ) -> Verified:
        """Return how far the steps over each of `wanted` are apart.

        Args:
            wanted: rows of each step; between two of them the model takes the plain one's step.
            rounded: whether in the run's own precision too.
            rate: learning rate of those steps.
        """
        model, training = self.steps.model, self.steps.model.training
        device = self.steps.trainer.args.device.type
        wide = self.dtype == "float32" or fits_in_float32(model, device)
        verified = Verified(dtype="float32" if wide else self.dtype)
        rounding = Rounding()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
        try:
            with moved_from_start(model):
                for rows in wanted:
                    with whole_in_float32(model) if wide else contextlib.nullcontext():
                        plain = self._compare(rows, verified)
                    if rounded and wide and self.dtype != "float32":
                        rounding = self._round(rows, plain, rounding)
                    verified = replace(
                        verified, steps=verified.steps + 1, rows=verified.rows + len(rows)
                    )
                    if rows is not wanted[-1]:
                        _take(optimizer, model, plain)
        finally:
            model.train(training)
        return replace(verified, rounded=rounding.check())

    def _compare(self, rows: Sequence[Encoded], verified: Verified) -> Computed:
        """Return the plain step; how far the fast one is from it goes into `verified` (mutated)."""
        steps, dtype = self.steps, verified.dtype
        plain = self._plain(rows, dtype)
        if not math.isfinite(plain.loss):
            raise _NotFiniteError
        other = steps.rounded_otherwise(rows, dtype)
        noise = compare_gradients(other.gradients, plain.gradients)
        bounds = Bounds(dtype, noise, abs(other.loss - plain.loss))
        del other
        fast = steps.fast(rows, dtype)
        try:
            apart = _check(bounds, fast, plain)
        except RunError:
            # One order of sums does not show how far from the truth both are, where rows begin
            # alike and an error is the same in all of them.
            if (exact := self._in_float64(rows, dtype, self._plain)) is None:
                raise
            try:
                apart = _check(bounds, fast, exact)
            except RunError:
                # An activation that rounding moves over a kink, as ReLU's at 0, has another
                # derivative there, and the same value. In float64 nothing is rounded.
                bounds.check_loss(fast.loss, exact.loss)
                far = total(compare_gradients(fast.gradients, exact.gradients).values()).distance
                if not far <= KINK or steps.trainer.args.device.type != "cpu":
                    raise  # a card's kernels may be others in float64
                if (wide := self._in_float64(rows, dtype, steps.fast)) is None:
                    raise
                apart = _check(Bounds(dtype, dict.fromkeys(noise, Apart()), 0.0), wide, exact)
                verified.kinks = True
            rounded = compare_gradients(plain.gradients, exact.gradients)
            bounds = replace(bounds, noise=added(noise, rounded))
            verified.exact = max(verified.exact or 0.0, total(rounded.values()).distance)
        verified.loss, verified.gradient = map(max, apart, (verified.loss, verified.gradient))
        if self.dropout:
            expected = steps.with_dropout(rows, dtype, fused=False)
            dropped = steps.with_dropout(rows, dtype, fused=True)
            found = compare_gradients(dropped.gradients, expected.gradients)
            distance = bounds.check_gradients(found, "gradients with dropout")
            verified.dropout = max(verified.dropout or 0.0, distance)
        return plain

    def _plain(self, rows: Sequence[Encoded], dtype: str) -> Computed:
        """Return the plain step."""
        return self.steps.plain(rows, self.batch_size, dtype)

    def _in_float64(
        self, rows: Sequence[Encoded], dtype: str, step: Callable[..., Computed]
    ) -> Computed | None:
        """Return the plain or the fast step in float64; None where it cannot be computed."""
        model, device = self.steps.model, self.steps.trainer.args.device.type
        if dtype != "float32" or not fits_in_float64(model, device):
            return None
        try:
            with whole_in_float64(model):
                return step(rows, dtype=dtype)
        except RuntimeError:  # a kernel that is not made for it
            return None

    def _round(self, rows: Sequence[Encoded], exact: Computed, sums: Rounding) -> Rounding:
        """Return `sums` with what rounding does to a step in the run's precision."""
        steps = self.steps
        for draw, summed in enumerate(sums.plain):
            plain = (steps.rounded_otherwise(rows, self.dtype, draw) if draw
                     else steps.plain(rows, self.batch_size, self.dtype))  # fmt: skip
            sums.plain[draw] = added(summed, compare_gradients(plain.gradients, exact.gradients))
            sums.add_loss("plain", plain.loss, exact.loss)
        fast = steps.fast(rows, self.dtype)
        sums.fast = added(sums.fast, compare_gradients(fast.gradients, exact.gradients))
        sums.add_loss("fast", fast.loss, exact.loss)
        return sums


def _check(bounds: Bounds, step: Computed, expected: Computed) -> tuple[float, float]:
    """Return how far losses and gradients are from what is expected; raise where it is too far."""
    loss = bounds.check_loss(step.loss, expected.loss)
    return loss, bounds.check_gradients(compare_gradients(step.gradients, expected.gradients))


def _take(optimizer: torch.optim.Optimizer, model: torch.nn.Module, step: Computed) -> None:
    """Move `model` (mutated) by the optimizer's step on the gradients of `step`."""
    for name, parameter in model.named_parameters():
        if name in step.gradients:
            parameter.grad = step.gradients[name]
    optimizer.step()
    model.zero_grad()
