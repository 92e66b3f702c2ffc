"""One optimizer step of ftlevel's Trainer on the simulated GPU."""

from __future__ import annotations

import contextlib
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
from ftlevel.data.encoding.row import Encoded
from ftlevel.events import NullListener
from ftlevel.fast import gpu_attention as gpu
from ftlevel.fast.packing import PackedLayout
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.hardware import send
from ftlevel.objectives import Objective
from ftlevel.training.build_trainer import create_training_args
from ftlevel.training.gradients import GradientMonitor, Recovery
from ftlevel.training.hooks import TrainingHooks
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer
from gpu_sim.recorder import Recorder

DEVICE = torch.device("cuda:0")
MODE = FakeTensorMode(allow_non_fake_inputs=False)
_NO_CONTROL: Any = SimpleNamespace(
    should_log=False, should_evaluate=False, should_save=False, should_training_stop=False
)


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step on the GPU.

    Attributes:
        waits: number of host waits, by source line.
        launches: kernels of the forward and backward pass; the optimizer and norms use fused
            multi-tensor kernels on a GPU and one kernel per tensor here.
        weights: bytes on the GPU before the step.
        kept: additional bytes after the forward pass of the last micro-batch.
        peak: additional bytes at the maximum.
    """

    waits: dict[str, int]
    launches: int
    weights: int
    kept: int
    peak: int


def _computed_on_host(function: Any) -> Any:
    """Return `function` (of indices), computed on the host, with a fake result on the GPU."""

    @functools.lru_cache(maxsize=8)
    def compute(*arguments: Any, **others: Any) -> Any:
        with unset_fake_temporarily():
            result = function(*arguments[:-1], torch.device("cpu"), **others)
        return _send(result)

    return compute


def _send(value: Any) -> Any:
    """Return `value` with its tensors on the GPU, sent as in ftlevel's code."""
    if isinstance(value, torch.Tensor):
        return send(MODE.from_tensor(value), DEVICE)
    if isinstance(value, tuple):
        return tuple(map(_send, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _send(getattr(value, f.name)) for f in fields(value)})
    return value


# Fake tensors cannot be pinned; only the request matters here.
torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
gpu.pad_segments = _computed_on_host(gpu.pad_segments.__wrapped__)
gpu.get_lengths = _computed_on_host(gpu.get_lengths.__wrapped__)


def move_to_gpu(model: torch.nn.Module) -> None:
    """Replace every tensor of `model` (mutated) by a fake one on the GPU."""
    known: dict[int, Any] = {}

    def convert(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in known:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            known[id(tensor)] = (tensor, fake)  # keeps a reference, so that no id is reused
        return known[id(tensor)][1]

    with MODE:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):
                    tensors[name] = convert(tensor)


def _as_fake(value: Any) -> Any:
    """Return a batch whose tensors, at any depth, are fake."""
    if isinstance(value, torch.Tensor):
        return MODE.from_tensor(value)
    if isinstance(value, dict):
        return {name: _as_fake(item) for name, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, str):
        return type(value)(_as_fake(item) for item in value)
    if isinstance(value, PackedLayout):
        tensors = {name: getattr(value, name) for name in ("source", "restore", "needed")}
        return replace(value, **_as_fake(tensors))
    return value


@contextlib.contextmanager
def _record_forward_memory(trainer: Any, recorder: Recorder) -> Iterator[list[int]]:
    """Yield a list of the live bytes at the end of each forward pass in the block."""
    kept: list[int] = []
    original = trainer.compute_loss

    def compute(*arguments: Any, **settings: Any) -> Any:
        loss = original(*arguments, **settings)
        kept.append(recorder.live)
        return loss

    trainer.compute_loss = compute
    try:
        yield kept
    finally:
        del trainer.compute_loss


@contextlib.contextmanager
def disable_cache(model: Any) -> Iterator[None]:
    """Set `use_cache` to False, as Trainer does for training."""
    configs = [
        m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")
    ]
    for config in configs:
        config.use_cache = False
    yield


class _Trainer(FtlevelTrainer):
    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Do nothing: `move_to_gpu` has moved the model."""


def run_step(
    model: Any, config: Any, objective: Objective, fast: FastStep, rows: Sequence[Encoded]
) -> StepMetrics:
    """Return the metrics of one step over `rows`, including the optimizer.

    Args:
        model: model on the GPU.
        config: `TrainConfig` of the run.
        objective: training objective.
        fast: fast step of the model.
        rows: rows of the step.
    """
    run = SimpleNamespace(
        config=config,
        objective=objective,
        fast=fast.plan,
        schedule=SimpleNamespace(learning_rate=1e-4, steps=100),
        hooks=TrainingHooks(),
        data=SimpleNamespace(validation=[]),
        model=SimpleNamespace(dtype="bfloat16", device="cuda", family="llama"),
    )
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = create_training_args(run, Path(output_dir))  # type: ignore[arg-type]
        with MODE:
            trainer = _Trainer(objective=objective, model=model, args=arguments, fast=fast)
        batch = _as_fake(StepCollator(0, fast.plan, objective)(list(rows)))
        recorder = Recorder()
        with MODE, recorder:
            for tensor in (*model.parameters(), *model.buffers()):
                recorder.track(tensor)
            run_directory = RunDirectory(Path(output_dir))
            recovery = Recovery(
                trainer, config.train, run_directory, Processes(), NullListener(), None
            )
            monitor = GradientMonitor(
                NullListener(),
                trainer.take_step_loss,
                recovery,
                delays_checks=recovery.is_always_fatal,
            )
            monitor.checked, monitor._is_finished = 1, True
            monitor._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            optimizer = trainer.create_optimizer()
            weights = recorder.live
            recorder.reset()
            standalone = trainer.standalone_steps("bfloat16")
            with (
                _record_forward_memory(trainer, recorder) as kept,
                standalone,
                disable_cache(model),
            ):
                launches = _step(trainer, batch, monitor, optimizer, recorder)
        return StepMetrics(
            dict(recorder.waits), launches, weights, kept[-1] - weights, recorder.peak - weights
        )


def _step(
    trainer: Any, batch: Any, monitor: GradientMonitor, optimizer: Any, recorder: Recorder
) -> int:
    """Run one step of Trainer's loop without logging; return the number of launches."""
    args, model = trainer.args, trainer.model
    batch = send_to_device(batch, DEVICE, non_blocking=args.accelerator_config.non_blocking)
    count = trainer._get_num_items_in_batch([batch], DEVICE)
    trainer.training_step(model, batch, count)
    launches = recorder.launches
    state: Any = SimpleNamespace(global_step=4)
    torch.nn.utils.clip_grad_norm_([p for _, p in monitor._trainable], args.max_grad_norm)
    monitor.on_pre_optimizer_step(args, state, _NO_CONTROL, model=model, optimizer=optimizer)
    optimizer.step()
    monitor.on_optimizer_step(args, state, _NO_CONTROL)
    monitor.on_step_end(args, SimpleNamespace(global_step=5), _NO_CONTROL)  # type: ignore[arg-type]
    model.zero_grad()
    return launches
