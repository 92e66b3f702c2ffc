"""Loss and gradients of an optimizer step, computed plainly and by the Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.texts import distinct_texts
from ftlevel.fast.head.likelihoods import base_model, plain_loss, sum_of_ratios, with_baseline
from ftlevel.fast.layers.norm_glu import FusedGlu, FusedNorm
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import find_stacks
from ftlevel.task import LikelihoodObjective, StepObjective
from ftlevel.trained.generation import batches
from ftlevel.training.trainer import FtlevelTrainer


@dataclass(frozen=True)
class StepResult:
    """Mean loss of a step over its targets, in nats, and the gradients by tensor name."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Steps:
    """Compute steps before training; the trainer's token counts are restored."""

    trainer: FtlevelTrainer
    pad_id: int

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.trainer.model

    def plain_perturbed(self, rows: Sequence[Encoded], dtype: str, draw: int = 0) -> StepResult:
        """Return the plain step with different rounding errors, to measure their size.

        Rows and answers are computed one by one in reverse order, and each block's input is
        perturbed by a rounding error. Without that, rows of one length round alike in any order,
        and errors shared by two answers cancel in the gradient. `draw` selects the errors.
        """
        alone = len(rows[0].branches) > 1 and not isinstance(self.trainer.objective, StepObjective)
        model = _OneByOne(self.model) if alone else self.model
        with _perturbed_inputs(self.model, draw):
            return self._plain(model, rows[::-1], 1, dtype)

    def plain(self, rows: Sequence[Encoded], batch_size: int, dtype: str) -> StepResult:
        """Return the step as transformers and PEFT compute it: padded batches, no dropout."""
        return self._plain(self.model, rows, batch_size, dtype)

    def _plain(
        self, model: Any, rows: Sequence[Encoded], batch_size: int, dtype: str
    ) -> StepResult:
        objective, device = self.trainer.objective, self.trainer.args.device
        if isinstance(objective, StepObjective):
            return self._plain_whole(objective, rows, batch_size, dtype)
        options = self.trainer.loss
        _evaluate(self.model)
        self.model.zero_grad()
        loss, baseline = 0.0, self._baseline(rows, batch_size, dtype)
        parts = self._batches(rows, batch_size)
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
        return StepResult(loss, self._pop_gradients())

    def _plain_whole(
        self, objective: StepObjective, rows: Sequence[Encoded], batch_size: int, dtype: str
    ) -> StepResult:
        """Return the step of all texts in padded batches, with the graphs of all in memory."""
        device = self.trainer.args.device
        _evaluate(self.model)
        self.model.zero_grad()
        texts, step = distinct_texts(rows)
        vectors, parts = [], batches(texts, batch_size)
        for part, batch in zip(parts, self._batches(texts, batch_size), strict=True):
            del batch["labels"]
            with autocast(device.type, dtype):
                outputs, unpooled = self.model(**batch), [text.unpooled for text in part]
                vectors.append(objective.embed(outputs, batch["attention_mask"], unpooled))
        loss = objective.step_loss(torch.cat(vectors), step)
        torch.autograd.backward(loss)
        return StepResult(loss.item(), self._pop_gradients())

    def _baseline(self, rows: Sequence[Encoded], batch_size: int, dtype: str) -> Tensor | None:
        """Return the KTO baseline of a step's rewards (a scalar), or None."""
        objective, device = self.trainer.objective, self.trainer.args.device
        contrasts = [other for row in rows for other in row.contrasts]
        if not (isinstance(objective, LikelihoodObjective) and contrasts):
            return None
        with autocast(device.type, dtype):
            parts = self._batches(contrasts, batch_size)
            total = sum_of_ratios(None, self.model, objective, parts)
        return (total[0] / total[1]).clamp(min=0)

    def _batches(self, rows: Sequence[Encoded], batch_size: int) -> list[dict[str, Tensor]]:
        """Return padded batches of `rows` on the device."""
        collate = Collator(self.pad_id)
        return [self.trainer.on_device(collate(part)) for part in batches(rows, batch_size)]

    def fast(self, rows: Sequence[Encoded], dtype: str) -> StepResult:
        """Return the step as the Trainer computes it, with fused layers and without dropout."""
        return self._by_trainer(rows, dtype, _without_dropout)

    def with_dropout(self, rows: Sequence[Encoded], dtype: str, *, fused: bool) -> StepResult:
        """Return the step as the Trainer computes it with dropout, in `fused` or plain layers.

        Both use the same dropout masks.
        """
        torch.manual_seed(0)
        return self._by_trainer(rows, dtype, _keep_mode if fused else _use_plain_layers)

    def _by_trainer(
        self, rows: Sequence[Encoded], dtype: str, mode: Callable[[Any], None]
    ) -> StepResult:
        """Return the result of `training_step`, with `mode` applied before each forward pass."""
        trainer, device = self.trainer, self.trainer.args.device
        self.model.zero_grad()
        hook = self.model.register_forward_pre_hook(lambda model, _: mode(model))
        try:
            with trainer.standalone_steps(dtype):
                batch = trainer.data_collator(list(rows))
                trainer.prepare_step([batch], device)
                count = trainer.count_targets([batch], device) * trainer.args.world_size
                loss = trainer.training_step(self.model, batch, count)
        finally:
            hook.remove()
        scale = trainer.loss_scale
        return StepResult(float(loss), {n: g / scale for n, g in self._pop_gradients().items()})

    def _pop_gradients(self) -> dict[str, Tensor]:
        """Return the gradients, and clear them."""
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.model.zero_grad()
        return gradients


class _OneByOne:
    """Call a model on each row of a batch separately, without padding."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.get_base_model = getattr(model, "get_base_model", None)

    def __getattr__(self, name: str) -> Any:
        """Delegate to the model."""
        return getattr(self._model, name)

    def __call__(self, attention_mask: Tensor, **batch: Tensor) -> Any:
        """Return outputs with the logits of all rows."""
        width, logits = attention_mask.shape[1], []
        for index, mask in enumerate(attention_mask):
            length = int(mask.sum())
            row_batch = {
                name: value[index : index + 1, : None if name.startswith("decoder") else length]
                for name, value in batch.items()
            }
            scores = self._model(attention_mask=mask[None, :length], **row_batch).logits
            if scores.dim() > 2 and scores.shape[1] == length:
                scores = functional.pad(scores, (0, 0, 0, width - length))
            logits.append(scores)
        return SimpleNamespace(logits=torch.cat(logits))


@contextlib.contextmanager
def _perturbed_inputs(model: Any, draw: int) -> Iterator[None]:
    """Perturb the input of each block of `model` by up to one unit in the last place."""
    generator = torch.Generator().manual_seed(draw)

    def move(_: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        states = args[0] if args else kwargs["hidden_states"]
        errors = 2 * torch.rand(states.shape, generator=generator) - 1
        errors *= torch.finfo(states.dtype).eps
        perturbed = states + states.detach() * errors.to(states)
        return (
            ((perturbed, *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": perturbed})
        )

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
    """Disable dropout in `model` (mutated); 8-bit linear layers compute as in training.

    In eval mode, bitsandbytes on a CPU rounds their inputs to 8 bits too (`MatMul8bitLt`).
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            module.training = True


def _keep_mode(model: torch.nn.Module) -> None:
    """Leave the model in training mode."""


def _without_dropout(model: torch.nn.Module) -> None:
    """Disable dropout in `model` (mutated); fused modules compute as in training."""
    _evaluate(model)
    for module in _fused_modules(model):
        module.training = True


def _use_plain_layers(model: torch.nn.Module) -> None:
    """Make fused modules of `model` (mutated) compute as the modules that they replace."""
    for module in _fused_modules(model):
        module.training = False


@contextlib.contextmanager
def perturb_weights(model: torch.nn.Module) -> Iterator[None]:
    """Perturb the trainable tensors of `model` (mutated) inside the block, and restore them.

    LoRA's B and similar tensors start at zero, which makes gradients of preceding tensors zero,
    correct or not. Zero tensors get noise with standard deviation 0.2 / √(last axis), about a fifth
    of a LoRA's layer output; others get a twentieth of their own.
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
