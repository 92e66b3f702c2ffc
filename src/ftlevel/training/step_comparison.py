"""Loss and gradients of an optimizer step: plain or by the Trainer, and their differences.

Steps are compared in float32. A correct fast step differs from the plain one by at most a multiple
of its rounding errors.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import RunError, is_out_of_memory
from ftlevel.fast.fused_layers import FusedGlu, FusedNorm
from ftlevel.fast.likelihoods import base_model, compute_full_loss
from ftlevel.models.module_tree import get_stacks
from ftlevel.trained.generation import batches
from ftlevel.training.trainer import FtlevelTrainer

Gradients = Mapping[str, Tensor]

_CHUNK_SIZE = 2**20
"""Elements that are compared in float64 at once; a whole embedding would take more memory than the
model."""


@dataclass(frozen=True)
class GradientDifference:
    """Comparison of a gradient g with a reference r, as sums over elements; supports `+`.

    Attributes:
        difference: Σ (g − r)².
        reference: Σ r².
    """

    difference: float = 0.0
    reference: float = 0.0

    def __add__(self, other: GradientDifference) -> GradientDifference:
        return GradientDifference(
            self.difference + other.difference, self.reference + other.reference
        )

    @property
    def distance(self) -> float:
        """Relative distance ‖g − r‖ / ‖r‖; 0 if both norms are 0, infinite if only ‖r‖ is."""
        if self.reference == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / self.reference) ** 0.5)


def compare_gradients(gradients: Gradients, reference: Gradients) -> dict[str, GradientDifference]:
    """Returns tensor name → comparison with `reference`; a missing gradient counts as zero."""
    differences = {}
    for name in sorted(gradients.keys() | reference.keys()):
        like = reference.get(name, gradients.get(name))
        if like is None:
            raise KeyError(name)
        zeros = torch.zeros((), dtype=like.dtype).expand_as(like)
        pair = [of.get(name, zeros).cpu().flatten() for of in (gradients, reference)]
        chunks = zip(*(torch.split(tensor, _CHUNK_SIZE) for tensor in pair), strict=True)
        differences[name] = total(_compare(*part) for part in chunks)
    return differences


def _compare(gradient: Tensor, reference: Tensor) -> GradientDifference:
    """Returns the comparison of two tensors, in float64 on the CPU, since MPS has no float64."""
    g, r = gradient.double(), reference.double()
    return GradientDifference(float((g - r).square().sum()), float(r.square().sum()))


def total(parts: Iterable[GradientDifference]) -> GradientDifference:
    """Returns the sum of the comparisons `parts`, as if of one long tensor."""
    return sum(parts, GradientDifference())


def get_tensor_type(name: str) -> str:
    """Returns the end of a tensor's name without adapter and index: `lora_A` or `norm.weight`."""
    names = [part for part in name.split(".") if not part.isdigit()]
    if names[-1] in ("weight", "bias") and len(names) > 1 and "default" in names[-2]:
        names = names[:-2] + ([names[-1]] if names[-1] == "bias" else [])
    if names[-1] == "default":
        names = names[:-1]
    if names[-1] in ("weight", "bias") and len(names) > 1:
        return f"{re.sub(r'_?[0-9]+$', '', names[-2])}.{names[-1]}"
    return names[-1]


def sum_by_type(tensors: Mapping[str, GradientDifference]) -> dict[str, GradientDifference]:
    """Returns the comparisons of `tensors`, summed by type of tensor."""
    totals: dict[str, GradientDifference] = defaultdict(GradientDifference)
    for name, difference in tensors.items():
        totals[get_tensor_type(name)] += difference
    return dict(totals)


def add_differences(
    first: Mapping[str, GradientDifference], other: Mapping[str, GradientDifference]
) -> dict[str, GradientDifference]:
    """Returns tensor name → `first[name] + other[name]`; a missing comparison counts as zero."""
    return {
        name: first.get(name, GradientDifference()) + other.get(name, GradientDifference())
        for name in {**first, **other}
    }


ORDER = 10.0
"""Maximal distance of the fast step from the plain one, as a multiple of the effect of a different
summation order on the plain step. Orders differ more for packed rows than for padded ones."""
FLOAT32_EPSILON = 2.0**-23
"""Relative rounding of float32: a loss that is a difference of terms keeps that of its terms."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Relative differences of loss and gradients that are always accepted."""
MIN_LOSS = 1e-3
"""Smallest loss that a difference is related to: the first loss of reinforcement learning is 0."""
MAX_KINK_DISTANCE = 2e-2
"""Maximal relative distance of all gradients in float32 if rounding moves an activation over a
kink; 6e-3 was measured for one tensor."""


@dataclass
class StepComparison:
    """Differences of the fast step from plain transformers and PEFT, relative in the 2-norm.

    Attributes:
        loss, gradient: largest relative difference over all steps.
        dropout: gradient difference of fused and PEFT's layers with dropout; None if not compared.
        exact: distance of the plain step's gradient from the same step in float64; None if that was
            not needed. If set, `loss` and `gradient` are distances of the fast step from float64.
        kinks: whether rounding moved a value over a kink of the activation, such as ReLU's 0, so
            that `loss` and `gradient` compare both steps in float64.
    """

    steps: int = 0
    rows: int = 0
    loss: float = 0.0
    gradient: float = 0.0
    dropout: float | None = None
    exact: float | None = None
    kinks: bool = False


class FastStepError(RunError):
    """A fast step that is not the plain one; `problem` is how they differ."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"--verify-fast: the fast step is not the plain one: {problem}. Train with --no-fast, "
            "and please report it with the command."
        )
        self.problem = problem


@dataclass(frozen=True)
class Bounds:
    """Largest allowed differences between two steps that differ only by summation order.

    Attributes:
        noise: tensor name → change of the tensor's gradient by another summation order.
        noise_of_loss: change of the loss by another summation order, in nats.
    """

    noise: Mapping[str, GradientDifference]
    noise_of_loss: float

    def check_loss(self, loss: float, expected: float) -> float:
        """Returns the relative difference of the losses; FastStepError if it is too large."""
        difference = abs(loss - expected)
        bound = LOSS_TOLERANCE * abs(expected) + ORDER * self.noise_of_loss
        if not difference <= bound:
            raise FastStepError(
                f"losses differ by {difference:.2g} of {expected:.4g} in float32 (rounding "
                f"explains {bound:.2g})"
            )
        return difference / max(abs(expected), MIN_LOSS)

    def check_gradients(
        self, differences: Mapping[str, GradientDifference], label: str = "gradients"
    ) -> float:
        """Returns the relative distance over all tensors; FastStepError if one is too large."""
        overall, norms = total(differences.values()), norms_of(differences)
        for name, difference in sorted(differences.items(), key=lambda item: -item[1].difference):
            norm, noise = norms[name], self.noise[name].difference ** 0.5
            # Terms of a bias cancel if only differences of logits count, as in a softmax of scores.
            noise += FLOAT32_EPSILON if name.endswith(".bias") else 0.0
            bound = GRADIENT_TOLERANCE * norm + ORDER * noise
            if not difference.difference**0.5 <= bound:
                tensor = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                raise FastStepError(
                    f"{label} of {tensor} differ by {difference.distance:.2g} in float32 "
                    f"(rounding explains {bound / norm:.2g})"
                )
        bound = GRADIENT_TOLERANCE / 2 + ORDER * total(self.noise.values()).distance
        if not overall.distance <= bound:
            raise FastStepError(
                f"{label} differ by {overall.distance:.2g} in float32 (rounding explains "
                f"{bound:.2g})"
            )
        return overall.distance


def norms_of(differences: Mapping[str, GradientDifference]) -> dict[str, float]:
    """Returns tensor name → reference norm, at least 1 % of its type's mean and of the total norm.

    Rounding errors of tensors with almost no gradient, such as the bias of span logits or the keys
    of saturated attention, are as large as those of other tensors.
    """
    num_tensors = Counter(map(get_tensor_type, differences))
    kinds, total_reference = sum_by_type(differences), total(differences.values()).reference
    return {
        name: max(
            difference.reference,
            1e-4 * kinds[kind].reference / num_tensors[kind],
            1e-4 * total_reference,
            1e-60,
        )
        ** 0.5
        for name, difference in differences.items()
        for kind in (get_tensor_type(name),)
    }


@dataclass(frozen=True)
class StepResult:
    """Result of a step: mean loss over targets, in nats, and gradients by tensor name."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Steps:
    """Computes loss and gradients by the fast step (`fast`) and plain transformers and PEFT."""

    trainer: FtlevelTrainer
    pad_id: int

    @property
    def model(self) -> Any:
        """The model that is trained."""
        return self.trainer.model

    def perturbed_reference(self, rows: Sequence[Encoded]) -> StepResult:
        """Returns the plain step's result with other rounding errors than `reference` has.

        Rows and answers are computed one by one in reverse order, and each block's input is
        perturbed by a random rounding error, since rows of equal length round alike in any order,
        and errors shared by two answers cancel in the gradient.
        """
        is_paired = len(rows[0].sequences) > 1 and not self.trainer.objective.needs_whole_step
        model = _OneByOne(self.model) if is_paired else self.model
        with _perturbed_inputs(self.model):
            return self._reference(model, rows[::-1], 1)

    def reference(self, rows: Sequence[Encoded], batch_size: int) -> StepResult:
        """Returns loss and gradients of the plain step: padded rows, PEFT's layers, no dropout."""
        return self._reference(self.model, rows, batch_size)

    def _reference(self, model: Any, rows: Sequence[Encoded], batch_size: int) -> StepResult:
        objective, loss_config = self.trainer.objective, self.trainer.loss
        self.model.eval()
        self.model.zero_grad()
        whole = objective.compute_whole_step(model, rows, self._collate, batch_size)
        if whole is not None:
            torch.autograd.backward(whole)
            return StepResult(whole.item(), self._pop_gradients())
        micro_batches, loss = self._batches(rows, batch_size), 0.0
        self.trainer.prepare_plain(
            micro_batches, rows, partial(self._batches, batch_size=batch_size)
        )
        num_targets = [
            objective.training_count(batch["labels"], loss_config) for batch in micro_batches
        ]
        total = objective.step_count(num_targets)
        for batch in micro_batches:
            mask = batch["attention_mask"]
            summed, _, _ = compute_full_loss(model, objective, batch, mask, loss_config)
            batch_loss = (summed / total).sum()
            torch.autograd.backward(batch_loss)
            loss += batch_loss.item()
        return StepResult(loss, self._pop_gradients())

    def _batches(self, rows: Sequence[Encoded], batch_size: int) -> list[dict[str, Tensor]]:
        return [self._collate(part) for part in batches(rows, batch_size)]

    def _collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        return self.trainer.on_device(Collator(self.pad_id)(rows))

    def fast(self, rows: Sequence[Encoded]) -> StepResult:
        """Returns the result of the Trainer's step, with fused layers and without dropout."""
        return self._run_trainer(rows, _without_dropout)

    def with_dropout(self, rows: Sequence[Encoded], *, fused: bool) -> StepResult:
        """Returns the Trainer's step result with dropout; masks are the same for either `fused`."""
        torch.manual_seed(0)
        return self._run_trainer(rows, _keep_mode if fused else _use_unfused_layers)

    def _run_trainer(self, rows: Sequence[Encoded], mode: Callable[[Any], None]) -> StepResult:
        """Returns the Trainer's step result; `mode(model)` is called before each forward pass.

        Raises FastStepError if the step fails, unless it runs out of memory.
        """
        trainer, device = self.trainer, self.trainer.args.device
        self.model.zero_grad()
        before_forward = self.model.register_forward_pre_hook(lambda model, _: mode(model))
        try:
            with before_forward, trainer.standalone_steps("float32"):
                batch = trainer.data_collator(list(rows))
                trainer.prepare_step([batch], device)
                count = trainer.count_targets([batch], device) * trainer.args.world_size
                loss = trainer.training_step(self.model, batch, count)
        except (RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FastStepError(f"it fails ({message})") from error
        return StepResult(float(loss), self._pop_gradients())

    def _pop_gradients(self) -> dict[str, Tensor]:
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None
        }
        self.model.zero_grad()
        return gradients


class _OneByOne:
    """Wrapper that calls a model on each row of a batch separately, without padding."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.get_base_model = getattr(model, "get_base_model", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, attention_mask: Tensor, **batch: Tensor) -> Any:
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
def _perturbed_inputs(model: Any) -> Iterator[None]:
    """In the `with` block, perturb each block's input by random rounding errors."""
    generator = torch.Generator().manual_seed(0)

    def move(_: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        states = args[0] if args else kwargs["hidden_states"]
        errors = 2 * torch.rand(states.shape, generator=generator) - 1
        errors *= torch.finfo(states.dtype).eps
        inputs = states + states.detach() * errors.to(states)
        return (
            ((inputs, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inputs})
        )

    with contextlib.ExitStack() as hooks:
        for block in chain(*get_stacks(base_model(model))):
            hooks.enter_context(block.register_forward_pre_hook(move, with_kwargs=True))
        yield


def _fused_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    from ftlevel.fast.fused_lora import FusedForward

    for module in model.modules():
        if isinstance(module, FusedForward | FusedNorm | FusedGlu) and isinstance(
            module, torch.nn.Module
        ):
            yield module


def _keep_mode(model: torch.nn.Module) -> None:
    """Leave the model in training mode, with dropout."""


def _without_dropout(model: torch.nn.Module) -> None:
    model.eval()
    for module in _fused_modules(model):
        module.training = True


def _use_unfused_layers(model: torch.nn.Module) -> None:
    """Set fused modules of `model` to eval mode, in which the modules that they replace run."""
    for module in _fused_modules(model):
        module.training = False


@contextlib.contextmanager
def perturb_weights(model: torch.nn.Module) -> Iterator[None]:
    """Perturb trainable tensors of `model` (modified) inside the `with` block, then restore them.

    LoRA's B is zero before training, so A has a zero gradient, even if computed wrongly. Tensors of
    zeros get noise with standard deviation 0.2 / √(size of the last axis): a LoRA's update is then
    a fifth of its layer's output. Other tensors get noise of a twentieth of their own deviation.
    """
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            std = float(p.float().std()) if p.numel() > 1 else 0.0
            size = 0.05 * std if std else 0.2 / p.shape[-1] ** 0.5 if p.dim() else 0.2
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
