"""One optimizer step of ftlevel's own Trainer on the card that is not there."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.encoding.encode import Encoded
from ftlevel.events import NullListener
from ftlevel.fast import gpu_attention as gpu
from ftlevel.fast.packing import PackedLayout
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.hardware import send
from ftlevel.objectives import Objective
from ftlevel.training.build_trainer import create_training_args
from ftlevel.training.gradients import GradientMonitor, Recovery
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer
from gpu_sim.recorder import Recorder

CARD = torch.device("cuda:0")
MODE = FakeTensorMode(allow_non_fake_inputs=False)
_NO_CONTROL: Any = SimpleNamespace(
    should_log=False, should_evaluate=False, should_save=False, should_training_stop=False
)


@dataclass(frozen=True)
class Found:
    """What a step asked of the card.

    Attributes:
        waits: what the host waited for the card for.
        launches: kernels of the forward and backward pass; those of the optimizer and of norms
            go through all tensors at once on a card, and one by one here.
        weights: bytes on the card before the step.
        kept: bytes more when the forward pass of the last micro-batch is over.
        peak: bytes more at most.
        seconds: by the roofline, by the kind of operation.
        operations: of products and attention.
    """

    waits: dict[str, int]
    launches: int
    weights: int
    kept: int
    peak: int
    seconds: dict[str, float]
    operations: float


class Params4bit(FakeTensor):
    """A weight in 4 bits; libraries tell it by the name of its class."""


def _made_on_the_host(make: Any) -> Any:
    """Return `make` of indices, with numbers on the host and none on the card."""

    @functools.lru_cache(maxsize=8)
    def made(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            found = make(*arguments[:-1], torch.device("cpu"))
        return _sent(found)

    return made


def _sent(value: Any) -> Any:
    """Return `value` with its tensors on the card, sent as the code that made them does."""
    if isinstance(value, torch.Tensor):
        return send(MODE.from_tensor(value), CARD)
    if isinstance(value, tuple):
        return tuple(map(_sent, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _sent(getattr(value, f.name)) for f in fields(value)})
    return value


gpu.pad_segments = _made_on_the_host(gpu.pad_segments.__wrapped__)
gpu.get_lengths = _made_on_the_host(gpu.get_lengths.__wrapped__)


def to_card(model: torch.nn.Module) -> None:
    """Put every tensor of `model` (mutated), whatever holds it, onto the card, without numbers."""
    known: dict[int, Any] = {}

    def convert(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in known:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)
            if isinstance(tensor, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
                if (state := getattr(tensor, "quant_state", None)) is not None:
                    made.__class__ = Params4bit
                    made.quant_state = _state_to_card(state, convert)  # type: ignore[attr-defined]
                    made.bnb_quantized = True  # type: ignore[attr-defined]
            known[id(tensor)] = (tensor, made)  # held, so that no id comes twice
        return known[id(tensor)][1]

    with MODE:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    held[name] = convert(tensor)
            if (state := getattr(module, "quant_state", None)) is not None:
                module.quant_state = _state_to_card(state, convert)  # type: ignore[assignment]


def _state_to_card(state: Any, convert: Any) -> Any:
    """Return a copy of bitsandbytes' `QuantState` with its tensors on the card."""
    moved = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, convert(value))
        elif type(value) is type(state):
            setattr(moved, name, _state_to_card(value, convert))
    return moved


def _as_fake(value: Any) -> Any:
    """Return a batch whose tensors, wherever they are in it, have no numbers."""
    if isinstance(value, torch.Tensor):
        return MODE.from_tensor(value)
    if isinstance(value, dict):
        return {name: _as_fake(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, str):
        return type(value)(_as_fake(part) for part in value)
    if isinstance(value, PackedLayout):
        parts = {name: getattr(value, name) for name in ("source", "restore", "needed")}
        return replace(value, **_as_fake(parts))
    return value


@contextlib.contextmanager
def _told_of_the_forward(trainer: Any, recorder: Recorder) -> Iterator[list[int]]:
    """Give a list of the bytes that are alive at the end of each forward pass inside the block."""
    kept: list[int] = []
    whole = trainer.compute_loss

    def compute(*arguments: Any, **settings: Any) -> Any:
        loss = whole(*arguments, **settings)
        kept.append(recorder.live)
        return loss

    trainer.compute_loss = compute
    try:
        yield kept
    finally:
        del trainer.compute_loss


@contextlib.contextmanager
def without_a_cache(model: Any) -> Iterator[None]:
    """Have `model` keep no keys for generation, as Trainer does once it trains."""
    configs = [
        m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")
    ]
    for config in configs:
        config.use_cache = False
    yield


class _Trainer(FtlevelTrainer):
    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave the model where `to_card` has put it."""


def run_step(
    model: Any,
    config: Any,
    objective: Objective,
    fast: FastStep,
    rows: Sequence[Encoded],
    family: str,
    optimize: bool = True,
) -> Found:
    """Return what one step over `rows` asks of the card, its optimizer's part with it.

    Args:
        model: on the card.
        config: `TrainConfig` of the run.
        objective: what it is trained on.
        fast: the fast step that is on it.
        rows: of the step.
        family: `model_type`.
        optimize: whether the optimizer takes the step.
    """
    run = SimpleNamespace(
        config=config,
        objective=objective,
        fast=fast.plan,
        schedule=SimpleNamespace(learning_rate=1e-4, steps=100),
        data=SimpleNamespace(validation=[]),
        model=SimpleNamespace(dtype="bfloat16", device="cuda", family=family),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = create_training_args(run, Path(folder))  # type: ignore[arg-type]
        with MODE:
            trainer = _Trainer(objective=objective, model=model, args=arguments, fast=fast)
        batch = _as_fake(StepCollator(0, fast.plan, objective)(list(rows)))
        recorder = Recorder()
        with MODE, recorder:
            for tensor in (*model.parameters(), *model.buffers()):
                recorder.track(tensor)
            directory = RunDirectory(Path(folder))
            recovery = Recovery(trainer, config.train, directory, Processes(), NullListener(), None)
            proof = GradientMonitor(
                NullListener(),
                trainer.take_step_loss,
                recovery,
                delays_checks=recovery.is_always_fatal,
            )
            proof.checked, proof._is_finished = 1, True
            proof._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            optimizer = trainer.create_optimizer() if optimize else None
            weights = recorder.live
            recorder.reset()
            alone = trainer.standalone_steps("bfloat16")
            with _told_of_the_forward(trainer, recorder) as kept, alone, without_a_cache(model):
                launches = _step(trainer, batch, proof, optimizer, recorder)
        return Found(
            dict(recorder.waits), launches, weights, kept[-1] - weights,
            recorder.peak - weights, dict(recorder.seconds), recorder.operations,
        )  # fmt: skip


def _step(
    trainer: Any, batch: Any, proof: GradientMonitor, optimizer: Any, recorder: Recorder
) -> int:
    """Go through what Trainer's loop does in a step that is not logged; return the launches."""
    args, model = trainer.args, trainer.model
    batch = send_to_device(batch, CARD, non_blocking=args.accelerator_config.non_blocking)
    count = trainer._get_num_items_in_batch([batch], CARD)
    trainer.training_step(model, batch, count)
    launches = recorder.launches
    state: Any = SimpleNamespace(global_step=4)
    torch.nn.utils.clip_grad_norm_([p for _, p in proof._trainable], args.max_grad_norm)
    proof.on_pre_optimizer_step(args, state, _NO_CONTROL, model=model, optimizer=optimizer)
    if optimizer is not None:
        optimizer.step()
    proof.on_optimizer_step(args, state, _NO_CONTROL)
    proof.on_step_end(args, SimpleNamespace(global_step=5), _NO_CONTROL)  # type: ignore[arg-type]
    model.zero_grad()
    return launches


def find_unseen_faults() -> list[str]:
    """Return the faults of a step that this simulation would not see; it should see them all."""
    unseen = []
    with MODE:
        there, here = torch.empty(2, device=CARD), torch.empty(2)
        try:
            there + here
            unseen.append("tensors on two devices")
        except RuntimeError:
            pass
        for name, act in {
            "a number is asked for": lambda: float(there.sum()),
            "a copy onto the card that is waited for": lambda: here.to(CARD),
            "a copy from the card": lambda: there.cpu(),
        }.items():
            with Recorder() as recorder:
                act()
            if sum(recorder.waits.values()) != 1:
                unseen.append(name)
        with Recorder() as recorder:
            here.to(CARD, non_blocking=True)
            one = torch.empty(1 << 18, device=CARD) + 1
            del one
        if recorder.waits or recorder.peak < 2 << 20 or recorder.live:
            unseen.append("memory that is let go again")
    return unseen
