"""An optimizer step's loss and gradients, computed the plain way and by the Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.scoring import batches
from ftlevel.fast.head.likelihoods import base_model, plain_loss, sum_of_ratios, with_baseline
from ftlevel.fast.layers.norm_glu import FusedGlu, FusedNorm
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import find_stacks
from ftlevel.task import LikelihoodObjective
from ftlevel.training.trainer import FtlevelTrainer


@dataclass(frozen=True)
class Computed:
    """What a step gives.

    Attributes:
        loss: mean over its targets, in nats.
        gradients: name of a trained tensor → its gradient, of the tensor's shape.
    """

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """Computes steps outside of a run.

    Attributes:
        trainer: of the run, before its first step. What it counts is as before afterwards.
        pad_id: fills a batch.
    """

    trainer: FtlevelTrainer
    pad_id: int

    @property
    def model(self) -> Any:
        """What is trained."""
        return self.trainer.model

    def rounded_otherwise(self, rows: Sequence[Encoded], dtype: str, draw: int = 0) -> Computed:
        """Return the plain step with other rounding errors, by which it may be told from itself.

        Rows, and the answers of one, go through the model one by one, the last row first; and what
        each block begins with is a rounding error away from what it was. Rows of one length are
        rounded alike in any order: what two answers have in common would cancel in the gradient
        without a trace of how far it was rounded.

        Args:
            rows: of the step.
            dtype: compute precision's name.
            draw: another number gives other errors.
        """
        model = _OneByOne(self.model) if len(rows[0].branches) > 1 else self.model
        with _rounding_errors(self.model, draw):
            return self._plain(model, rows[::-1], 1, dtype)

    def plain(self, rows: Sequence[Encoded], batch_size: int, dtype: str) -> Computed:
        """Return the step as transformers and PEFT compute it: padded batches, no dropout.

        Args:
            rows: of the step.
            batch_size: rows of a batch; the gradients of all are summed.
            dtype: compute precision's name.
        """
        return self._plain(self.model, rows, batch_size, dtype)

    def _plain(self, model: Any, rows: Sequence[Encoded], batch_size: int, dtype: str) -> Computed:
        objective, device = self.trainer.objective, self.trainer.args.device
        options = self.trainer.loss
        _evaluate(self.model)
        self.model.zero_grad()
        collate, loss = Collator(self.pad_id), 0.0
        baseline = self._baseline(rows, batch_size, dtype)
        parts = [
            {name: value.to(device) for name, value in collate(part).items()}
            for part in batches(rows, batch_size)
        ]
        counts = [objective.training_count(batch["labels"], options) for batch in parts]
        count = torch.stack(counts).sum(0)
        for batch in parts:
            if baseline is not None:
                batch["verdicts"] = with_baseline(batch["verdicts"], baseline.to(device))
            with autocast(device.type, dtype):
                mask = batch["attention_mask"]
                summed, _, _ = plain_loss(model, objective, batch, mask, options)
            share = (summed / count).sum()
            torch.autograd.backward(share)
            loss += share.item()
        return Computed(loss, self._take_gradients())

    def _baseline(
        self, rows: Sequence[Encoded], batch_size: int, dtype: str
    ) -> torch.Tensor | None:
        """Return what is taken off the rewards of a step (a scalar), where something is."""
        objective, device = self.trainer.objective, self.trainer.args.device
        contrasts = [other for row in rows for other in row.contrasts]
        if not (isinstance(objective, LikelihoodObjective) and contrasts):
            return None
        collate = Collator(self.pad_id)
        parts = [
            {name: value.to(device) for name, value in collate(part).items()}
            for part in batches(contrasts, batch_size)
        ]
        with autocast(device.type, dtype):
            total = sum_of_ratios(None, self.model, objective, parts)
        return (total[0] / total[1]).clamp(min=0)

    def fast(self, rows: Sequence[Encoded], dtype: str) -> Computed:
        """Return the step as the Trainer computes it, fused layers as in training, no dropout."""
        return self._by_trainer(rows, dtype, _without_dropout)

    def with_dropout(self, rows: Sequence[Encoded], dtype: str, *, fused: bool) -> Computed:
        """Return the step as the Trainer computes it, dropout and all.

        Args:
            rows: of the step.
            dtype: compute precision's name.
            fused: whether in fused layers; what is dropped is the same with and without.
        """
        torch.manual_seed(0)
        return self._by_trainer(rows, dtype, _nothing if fused else _unfused)

    def _by_trainer(
        self, rows: Sequence[Encoded], dtype: str, mode: Callable[[Any], None]
    ) -> Computed:
        """Return what `FtlevelTrainer.training_step` gives, in a mode set before each forward."""
        trainer, device = self.trainer, self.trainer.args.device
        self.model.zero_grad()
        hook = self.model.register_forward_pre_hook(lambda model, _: mode(model))
        try:
            with trainer.computing_alone(dtype):
                batch = trainer.data_collator(list(rows))
                trainer.prepare_step([batch], device)
                count = trainer.count_targets([batch], device) * trainer.args.world_size
                loss = trainer.training_step(self.model, batch, count)
        finally:
            hook.remove()
        scale = trainer.loss_scale
        return Computed(float(loss), {n: g / scale for n, g in self._take_gradients().items()})

    def _take_gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients that are there, and leave none."""
        found = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.model.zero_grad()
        return found


class _OneByOne:
    """Calls a model on each row of a batch by itself, without its padding.

    Args:
        model: with scores of tokens, or of rows.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.get_base_model = getattr(model, "get_base_model", None)

    def __getattr__(self, name: str) -> Any:
        """Be the model in everything else."""
        return getattr(self._model, name)

    def __call__(self, attention_mask: torch.Tensor, **batch: torch.Tensor) -> Any:
        """Return outputs with the scores of all rows."""
        width, found = attention_mask.shape[1], []
        for index, mask in enumerate(attention_mask):
            length = int(mask.sum())
            own = {
                name: value[index : index + 1, : None if name.startswith("decoder") else length]
                for name, value in batch.items()
            }
            scores = self._model(attention_mask=mask[None, :length], **own).logits
            if scores.dim() > 2 and scores.shape[1] == length:
                scores = functional.pad(scores, (0, 0, 0, width - length))
            found.append(scores)
        return SimpleNamespace(logits=torch.cat(found))


@contextlib.contextmanager
def _rounding_errors(model: Any, draw: int) -> Iterator[None]:
    """Move what each block of `model` begins with by up to a unit in its last place."""
    generator = torch.Generator().manual_seed(draw)

    def move(_: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        states = args[0] if args else kwargs["hidden_states"]
        errors = 2 * torch.rand(states.shape, generator=generator) - 1
        errors *= torch.finfo(states.dtype).eps
        moved = states + states.detach() * errors.to(states)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    blocks = chain(*find_stacks(base_model(model)))
    hooks = [block.register_forward_pre_hook(move, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fused_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    from ftlevel.fast.layers.fused_lora import FusedForward

    for module in model.modules():
        if isinstance(module, FusedForward | FusedNorm | FusedGlu) and isinstance(
            module, torch.nn.Module
        ):
            yield module


def _evaluate(model: torch.nn.Module) -> None:
    """Let nothing be dropped in `model` (mutated), and linears of 8 bits compute as in training.

    Out of it bitsandbytes rounds their inputs to 8 bits too, on a CPU (`MatMul8bitLt`).
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            module.training = True


def _nothing(model: torch.nn.Module) -> None:
    """Training's own mode."""


def _without_dropout(model: torch.nn.Module) -> None:
    """Let nothing be dropped in `model` (mutated), and fused modules compute as in training."""
    _evaluate(model)
    for module in _fused_modules(model):
        module.training = True


def _unfused(model: torch.nn.Module) -> None:
    """Let fused modules of `model` (mutated) compute as the modules that they stand for."""
    for module in _fused_modules(model):
        module.training = False


@contextlib.contextmanager
def moved_from_start(model: torch.nn.Module) -> Iterator[None]:
    """Move what is trained a little at random inside the block, and back.

    LoRA's B, an adapter's last linear and others begin at zero, where gradients of what stands
    before them are zero, right or wrong. A tensor of zeros gets a standard deviation of
    0.2 / √(last axis), so that a LoRA moves its linear's output by about a fifth; any other a
    twentieth of its own.
    """
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            spread = float(p.float().std()) if p.numel() > 1 else 0.0
            size = 0.05 * spread if spread else 0.2 / p.shape[-1] ** 0.5 if p.dim() else 0.2
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
