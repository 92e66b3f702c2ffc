"""Training of a sharded model: its Trainer, its verification, and unsupported options.

`training.model` shards the model with FSDP2, block by block. accelerate's FSDP plugin is not used:
it shards trainable tensors together with the base in one precision, and prepares the model again.
Here the few tensors that a method trains stay whole in every process, so optimizer, clipping,
checkpoints and the saved adapter are those of a single process. Verification gathers no weights:
each process compares the digests of its part of the base.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.errors import ConfigError, excludes
from ftlevel.methods import METHODS
from ftlevel.models.hardware import free_memory_bytes
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream.libraries import leave_sharded
from ftlevel.models.upstream.shards import (
    AsyncCheckpointWriter,
    load_distributed_checkpoint,
    load_optimizer_state,
    local_shard,
    part_of,
    save_distributed_checkpoint,
    split_optimizer_state,
    whole,
)
from ftlevel.trained.adapt import finalize_method, load_initial_weights
from ftlevel.training.gradients import GradientMonitor
from ftlevel.training.model import PreparedModel, gather, trainable_parameters
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.proof import (
    CheckInputs,
    Proof,
    bound_of,
    check_logits,
    compare_frozen,
    create_check_inputs,
    create_proof,
)
from ftlevel.training.trainer import FtlevelTrainer, keep_settings
from ftlevel.weights.checkpoint import open_base

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler.pt"


class ShardedTrainer(FtlevelTrainer):
    """Trainer that calls the model equally often in every process and averages gradients.

    Each forward and backward pass gathers parts of the base, so all processes take part. Those with
    fewer micro-batches repeat some with zero loss. Gradients of unsharded tensors are averaged once
    per step, those of `--method full` by FSDP2. If host memory allows, checkpoints are copied there
    and written in the background; the next checkpoint and the end of training wait for the writer.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        leave_sharded(self)
        self._writer = AsyncCheckpointWriter()
        self._in_background = False
        self._replicated = [
            p for p in trainable_parameters(self.model) if not isinstance(p, DTensor)
        ]

    def num_forward_passes(self, count: int) -> int:
        """Returns the largest number of micro-batches of any process; `count` is this process's."""
        return self.processes.max(count)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Returns the loss of the batch; after the last batch of a step, averages the gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average_gradients(self._replicated, self.processes.count)
        return loss

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Broadcast the unsharded trained tensors of the first process, so that all start equal."""
        del model
        for parameter in self._replicated:
            distributed.broadcast(parameter.data, src=0)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Returns a null context, not FSDP2's: unreduced gradients are as large as the model."""
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> Tensor | None:
        norm = super()._clip_grad_norm(model)
        return norm if norm is None else whole(norm)

    def _get_grad_norm(self, model: Any, **known: Any) -> Any:
        norm = super()._get_grad_norm(model, **known)
        return whole(norm) if isinstance(norm, Tensor) else norm

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the trained tensors: unsharded ones from the first process, else every shard."""
        if self._replicated:
            if self.processes.is_first:
                super()._save(output_dir, state_dict=state_dict)
            return
        path = Path(output_dir or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        tensors = self.model.state_dict(keep_vars=True)
        self._writer.end()
        self._in_background = self._fits_in_memory(tensors)
        self._save_shards(tensors, path)
        if self.processes.is_first:
            self.model.config.save_pretrained(path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._replicated:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state, path = self.optimizer.state_dict(), Path(output_dir)
        tensors, state["state"] = split_optimizer_state(state["state"])
        self._save_shards(tensors, path / _OPTIMIZER)
        if self._in_background:
            self._writer.begin()
        if self.processes.is_first:
            torch.save(state, path / f"{_OPTIMIZER}.pt")
            torch.save(self.lr_scheduler.state_dict(), path / _SCHEDULER)

    def _fits_in_memory(self, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether copies of a checkpoint fit in half of every machine's free memory."""
        local_bytes = sum(local_shard(tensor).nbytes for tensor in tensors.values())
        local_bytes += sum(
            local_shard(value).nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        machine_bytes = local_bytes * self.processes.world.local_size
        return not self.processes.any(2 * machine_bytes > free_memory_bytes("cpu"))

    def _save_shards(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        if self._in_background:
            self._writer.copy(tensors, path)
        else:
            save_distributed_checkpoint(tensors, path)

    def run_after_save(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the current checkpoint is written, at once or in the background."""
        if self._in_background:
            self._writer.then(callback)
        else:
            callback()

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Train as Trainer does, then wait for checkpoints written in the background."""
        result = super().train(*arguments, **named)
        self._writer.end()
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._replicated:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_distributed_checkpoint(
            self.model.state_dict(keep_vars=True), Path(resume_from_checkpoint)
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._replicated or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint)
        state = torch.load(path / f"{_OPTIMIZER}.pt", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state["state"] = load_optimizer_state(state["state"], parameters, path / _OPTIMIZER)
        with keep_settings(self.optimizer):
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(path / _SCHEDULER, weights_only=True))


def save_sharded(
    prepared: PreparedModel,
    run: Run,
    processes: Processes,
    save: Callable[[Mapping[str, Tensor] | None], None],
) -> None:
    """Call `save` in the first process; a full model's weights are first gathered from all.

    Training-only modules of `prepared` (modified) are removed. `save` gets the gathered state dict,
    or None for an adapter. Write errors raise RunError in all processes.
    """
    weights = None
    if not hasattr(prepared.model, "peft_config"):
        weights = dict(gather(prepared.model, keep=processes.is_first))
    write = functools.partial(save, weights)
    settings = run.config.method, run.model.device, run.model.dtype
    finish = functools.partial(finalize_method, prepared.model, *settings)
    processes.in_all(write if processes.is_first else finish)


def average_gradients(parameters: Sequence[torch.nn.Parameter], num_processes: int) -> None:
    """Average the gradients of `parameters` (modified) over all processes."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return
    flat = torch.cat([gradient.float().flatten() for gradient in grads])
    distributed.all_reduce(flat)
    flat /= num_processes
    parts = torch.split(flat, [gradient.numel() for gradient in grads])
    for gradient, part in zip(grads, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def compute_initial_logits(model: PreparedModel, run: Run) -> Tensor | None:
    """Returns the logits before training (call in all processes); None if an adapter is trained."""
    if hasattr(model.model, "peft_config"):
        return None
    return create_check_inputs(run).logits(model.model)


def verify_sharded_run(
    model: PreparedModel,
    run: Run,
    output_dir: RunDirectory,
    gradients: GradientMonitor,
    processes: Processes,
    initial_logits: Tensor | None,
) -> Proof:
    """Compare the files saved in `output_dir` with the trained model, in all processes together.

    `initial_logits` are the logits before training; None if an adapter is trained. A difference
    raises RunError in all processes.
    """
    inputs, module = create_check_inputs(run), model.model
    frozen = processes.in_all(lambda: compare_frozen(module, model.digests))
    after = inputs.logits(module)
    if initial_logits is None:
        with module.disable_adapter():
            initial_logits = inputs.logits(module)
        max_diff = float(
            (_reload_logits(module, output_dir.adapter, inputs, processes) - after).abs().max()
        )
    else:
        max_diff = processes.in_all(lambda: compare_weights(module, run, output_dir.adapter))
    effect = float((after - initial_logits).abs().max())
    bound = bound_of(after, inputs)
    processes.in_all(lambda: check_logits(output_dir.adapter, max_diff, effect, bound))
    return create_proof((frozen, max_diff, effect), inputs, gradients)


def _reload_logits(model: Any, path: Path, inputs: CheckInputs, processes: Processes) -> Tensor:
    """Returns the logits of `model` with the weights in `path` in place of the trained ones.

    PEFT cannot add a second adapter: it would create that from this process's shard of the base.
    """
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.zero_()
        processes.in_all(lambda: load_initial_weights(model, path))
        try:
            return inputs.logits(model)
        finally:
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])


def compare_weights(model: Any, run: Run, directory: Path) -> float:
    """Returns the largest |difference| between this process's shards and weights in `directory`.

    Raises InputError if a tensor is missing.
    """
    saved = open_base(resolve_source(str(directory)), run.model.config, run.model.auto_class)
    diffs = [torch.zeros(())]
    for name, tensor in model.state_dict(keep_vars=True).items():
        diff = (local_shard(tensor).detach().cpu() - part_of(saved.read(name), tensor)).abs()
        diffs += [diff.max().float()] if diff.numel() else []
    return float(torch.stack(diffs).max())  # NaN if any is


def check_can_shard(run: Run, count: int | None) -> None:
    """Raise ConfigError with all reasons against `--shard`; `count` processes, None if unknown."""
    config, method = run.config, run.config.method
    if config.train.shard == "none":
        return
    info, quant, without = METHODS[method.kind], run.model.quant.kind, "Use --shard none."
    limit, is_full = run.objective.shard_limitation, not info.is_adapter
    best = f"--metric-for-best-model {config.train.metric_for_best_model}"
    if config.train.load_best_model_at_end:
        best = "--load-best-model-at-end"
    conflicts = (
        (count == 1, "one process", "it has the whole model",
         "Start several: --num-processes N, or a launcher such as torchrun."),
        (info.initialization.rewrites_base(method), "an initialization that changes the base",
         "its weights are sharded when the adapter is saved", "Use the default initialization."),
        (bool(info.resume_error), f"--method {method.kind} yet",
         "what it saves has other shapes than what it trains, and is verified on a full base",
         "Use --method lora."),
        (quant not in ("none", "4bit"), f"--quant {quant}",
         "its weights cannot be sharded by rows", "Use --quant 4bit, or none."),
        (bool(limit), f"--task {run.task.name}", limit, without),
        (config.distillation.teacher is not None, "--teacher yet",
         "every process would hold it whole", without),
        (is_full and run.model.dtype == "float16", "--method full and --dtype float16",
         "a scale would be halved where one process overflows, and not in the others",
         "Use --dtype bfloat16."),
        (is_full and run.best is not None and run.best.loads, f"--method full and {best}",
         "the trained weights are sharded, and only the last model is kept",
         f"Drop {best}, or use --shard none."),
        (is_full and config.speed.verify, "--method full and --verify-fast",
         "the gradients of the plain step are sharded",
         "Drop --verify-fast, or use --shard none."),
        (is_full and config.train.on_nonfinite == "rollback",
         "--method full and --on-nonfinite rollback", "", "Use skip."),
    )  # fmt: skip
    flag = f"--shard {config.train.shard}"
    if problems := [excludes(flag, *texts) for is_conflict, *texts in conflicts if is_conflict]:
        raise ConfigError(problems)
