"""The Trainer of a model of which each process holds a part."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from ftlevel.config.methods import MethodConfig
from ftlevel.models.hardware import free_memory_bytes
from ftlevel.models.upstream.parts import (
    PartsWriter,
    parts_of_state,
    read_parts,
    read_state,
    write_parts,
)
from ftlevel.models.upstream.shards import own_part, whole
from ftlevel.models.upstream.trainer import leave_sharded
from ftlevel.trained.adapt import finish_method
from ftlevel.training.memory.shards import gather, trained
from ftlevel.training.model import Adapted
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler.pt"


class ShardedTrainer(FtlevelTrainer):
    """Calls the model as often in every process, and averages what is whole in each.

    The base's parts are gathered in every forward and backward pass, which all processes must
    make together: one that has fewer micro-batches computes one again, for nothing. Gradients of
    what the method trains are averaged once a step; those of `--method full` by FSDP2 itself.

    Parts of a checkpoint are copied to the host and written while the run goes on, where the host
    has room for the copies; the next checkpoint, and the end, wait for it.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        leave_sharded(self)
        self._writer = PartsWriter()
        self._writes_aside = False
        self._whole = [p for p in trained(self.model) if not isinstance(p, DTensor)]

    def calls_of(self, own: int) -> int:
        """Return the most micro-batches that a process has."""
        return self.processes.most(own)

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the loss of the batch; after the last of a step, gradients are all processes'."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average(self._whole, self.processes.count)
        return loss

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Begin with the first process's tensors; Trainer would average a gradient as it comes."""
        del model
        for parameter in self._whole:
            distributed.broadcast(parameter.data, src=0)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Have FSDP2 reduce in every micro-step: a whole gradient is as large as a model."""
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> torch.Tensor | None:
        """Return the norm of the whole gradient, which is made no longer than it may be."""
        norm = super()._clip_grad_norm(model)
        return norm if norm is None else whole(norm)

    def _get_grad_norm(self, model: Any, **known: Any) -> Any:
        norm = super()._get_grad_norm(model, **known)
        return whole(norm) if isinstance(norm, torch.Tensor) else norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained: one process what is whole in each, else each its part."""
        if self._whole:
            if self.processes.is_first:
                super()._save(output_dir, state_dict=state_dict)
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = self.model.state_dict(keep_vars=True)
        self._writer.end()
        self._writes_aside = self._has_room(tensors)
        self._write_parts(tensors, directory)
        if self.processes.is_first:
            self.model.config.save_pretrained(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's state and the schedule, likewise."""
        if self._whole:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state, directory = self.optimizer.state_dict(), Path(output_dir)
        parts, state["state"] = parts_of_state(state["state"])
        self._write_parts(parts, directory / _OPTIMIZER)
        if self._writes_aside:
            self._writer.begin()
        if self.processes.is_first:
            torch.save(state, directory / f"{_OPTIMIZER}.pt")
            torch.save(self.lr_scheduler.state_dict(), directory / _SCHEDULER)

    def _has_room(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether half of the host's free memory holds copies of all that its processes write."""
        own = sum(own_part(tensor).nbytes for tensor in tensors.values())
        own += sum(
            own_part(value).nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        together = own * self.processes.world.local_size
        return not self.processes.any(2 * together > free_memory_bytes("cpu"))

    def _write_parts(self, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
        if self._writes_aside:
            self._writer.copy(tensors, directory)
        else:
            write_parts(tensors, directory)

    def when_written(self, act: Callable[[], None]) -> None:
        """Do `act` when the checkpoint that was begun is written; at once where nothing is."""
        if self._writes_aside:
            self._writer.then(act)
        else:
            act()

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Train as Trainer does, and wait for what is still being written."""
        found = super().train(*arguments, **named)
        self._writer.end()
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Take this process's part of the weights of a checkpoint."""
        if self._whole:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        read_parts(self.model.state_dict(keep_vars=True), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take this process's part of the optimizer's state of a checkpoint, and the schedule."""
        if self._whole or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        directory = Path(checkpoint)
        state = torch.load(directory / f"{_OPTIMIZER}.pt", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state["state"] = read_state(state["state"], parameters, directory / _OPTIMIZER)
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(directory / _SCHEDULER, weights_only=True))


def save_sharded(
    adapted: Adapted,
    method: MethodConfig,
    processes: Processes,
    save: Callable[[Mapping[str, torch.Tensor] | None], None],
) -> None:
    """Have the first process save what is trained, which all of them gather if it is the model.

    Args:
        adapted: the model, sharded; what only training needs is taken from it.
        method: the method's spec.
        processes: those of the run.
        save: writes it; is given the weights of a whole model, and None where an adapter is saved.

    Raises:
        RunError: it cannot be written; in all of them.
    """
    weights = None
    if not hasattr(adapted.model, "peft_config"):
        weights = dict(gather(adapted.model, keep=processes.is_first))
    write = functools.partial(save, weights)
    finish = functools.partial(finish_method, adapted.model, method)
    processes.in_all(write if processes.is_first else finish)


def average(parameters: Sequence[torch.nn.Parameter], count: int) -> None:
    """Give the gradients of `parameters` their mean over `count` processes, all at once (mutated).

    A tensor that no row of this process has reached has a gradient of zero.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    together = torch.cat([gradient.float().flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= count
    start = 0
    for gradient in gradients:
        end = start + gradient.numel()
        gradient.copy_(together[start:end].view_as(gradient))
        start = end
