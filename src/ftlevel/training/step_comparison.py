"""Loss and gradients of an optimizer step: plain or by the Trainer, and their differences.

A correct fast step differs from the plain one by at most a multiple of its rounding errors.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded, distinct_texts
from ftlevel.errors import RunError
from ftlevel.fast.fused_layers import FusedGlu, FusedNorm
from ftlevel.fast.likelihoods import base_model, compute_full_loss, sum_log_ratios, with_baseline
from ftlevel.models.hardware import autocast
from ftlevel.models.module_tree import get_stacks
from ftlevel.objectives import LikelihoodObjective, StepObjective
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
        along: Σ g · r.
    """

    difference: float = 0.0
    reference: float = 0.0
    along: float = 0.0

    def __add__(self, other: GradientDifference) -> GradientDifference:
        return GradientDifference(
            self.difference + other.difference,
            self.reference + other.reference,
            self.along + other.along,
        )

    @property
    def distance(self) -> float:
        """Relative distance ‖g − r‖ / ‖r‖; 0 if both norms are 0, infinite if only ‖r‖ is."""
        if self.reference == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / self.reference) ** 0.5)

    @property
    def length(self) -> float:
        """Relative excess length of g along r, ⟨g, r⟩ / ⟨r, r⟩ − 1; rounding errors average out."""
        return self.along / self.reference - 1 if self.reference else 0.0


def compare_gradients(gradients: Gradients, reference: Gradients) -> dict[str, GradientDifference]:
    """Returns tensor name → comparison with `reference`; a missing gradient counts as zero."""
    differences = {}
    for name in gradients.keys() | reference.keys():
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
    return GradientDifference(
        float((g - r).square().sum()), float(r.square().sum()), float((g * r).sum())
    )


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
TOLERANCES = {"float32": (1e-5, 1e-4)}
"""Relative differences of loss and gradients that are always accepted."""
HALF_TOLERANCES = (4e-3, 2e-2)
MAX_KINK_DISTANCE = 2e-2
"""Maximal relative distance of all gradients in float32 if rounding moves an activation over a
kink; 6e-3 was measured for one tensor."""
NUM_DRAWS = 3
"""Number of rounded plain steps. Gradients share a few errors, such as one of all logits, so a
single step may be close to float32, or of the right length, by chance."""
ROUNDING = 1.5
"""Maximal distance of the fast step's rounded gradient from float32, as a multiple of the plain
steps' largest; 1.1 was measured. For a single tensor it is `TENSOR_ROUNDING`."""
TENSOR_ROUNDING = 4.0
LENGTH = 0.3
"""Maximal deviation of its length from the range of the plain steps' lengths, as a multiple of the
same distance; 0.15 was measured."""


@dataclass
class StepComparison:
    """Differences of the fast step from plain transformers and PEFT, relative in the 2-norm.

    Attributes:
        dtype: dtype in which the steps were compared, besides the run's own.
        loss, gradient: largest relative difference over all steps.
        dropout: gradient difference of fused and PEFT's layers with dropout; None if not compared.
        exact: distance of the plain step's gradient from the same step in float64; None if that was
            not needed. If set, `loss` and `gradient` are distances of the fast step from float64.
        kinks: whether rounding moved a value over a kink of the activation, such as ReLU's 0, so
            that `loss` and `gradient` compare both steps in float64.
        rounded: type of tensor → (distance of the plain, of the fast gradient), in the run's dtype,
            from the plain gradient in float32.
    """

    steps: int = 0
    rows: int = 0
    dtype: str = "float32"
    loss: float = 0.0
    gradient: float = 0.0
    dropout: float | None = None
    exact: float | None = None
    kinks: bool = False
    rounded: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """Largest allowed differences between two steps that differ only by summation order.

    Attributes:
        noise: tensor name → change of the tensor's gradient by another summation order.
        noise_of_loss: change of the loss by another summation order, in nats.
    """

    dtype: str
    noise: Mapping[str, GradientDifference]
    noise_of_loss: float

    def check_loss(self, loss: float, expected: float) -> float:
        """Returns |loss − expected| / |expected|; RunError if this difference is too large."""
        diff, rtol = abs(loss - expected), TOLERANCES.get(self.dtype, HALF_TOLERANCES)[0]
        bound = rtol * abs(expected) + ORDER * self.noise_of_loss
        if not diff <= bound:
            raise create_mismatch_error(
                f"losses differ by {diff:.2g} of {expected:.4g}, and rounding explains {bound:.2g}",
                self.dtype,
            )
        return diff / max(abs(expected), 1e-12)

    def check_gradients(
        self, differences: Mapping[str, GradientDifference], label: str = "gradients"
    ) -> float:
        """Returns the relative distance over all tensors; RunError if a bound is exceeded."""
        rtol = TOLERANCES.get(self.dtype, HALF_TOLERANCES)[1]
        overall, norms = total(differences.values()), norms_of(differences)
        for name, difference in sorted(differences.items(), key=lambda item: -item[1].difference):
            norm = norms[name]
            bound = rtol * norm + ORDER * self.noise[name].difference ** 0.5
            if not difference.difference**0.5 <= bound:
                raise create_mismatch_error(
                    f"{label} of {name} differ by {difference.distance:.2g}, their length by "
                    f"{difference.length:+.2%}, and rounding explains {bound / norm:.2g}",
                    self.dtype,
                )
        bound = rtol / 2 + ORDER * total(self.noise.values()).distance
        if not overall.distance <= bound:
            raise create_mismatch_error(
                f"{label} differ by {overall.distance:.2g}, and rounding explains {bound:.2g}",
                self.dtype,
            )
        return overall.distance


@dataclass
class RoundingErrors:
    """Differences of steps in the run's dtype from plain transformers and PEFT in float32.

    Attributes:
        reference: of the plain step, tensor name → gradient difference; one dict per random draw.
        fast: of the fast step, tensor name → gradient difference.
        losses: "plain" or "fast" → relative difference of the loss, for each step.
    """

    reference: list[dict[str, GradientDifference]] = field(
        default_factory=lambda: [{} for _ in range(NUM_DRAWS)]
    )
    fast: dict[str, GradientDifference] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add_loss(self, step: str, loss: float, exact: float) -> None:
        """Record |loss / exact − 1| of a `step`, "plain" or "fast"; `exact` is the float32 loss."""
        self.losses.setdefault(step, []).append(abs(loss / exact - 1))

    def check(self) -> dict[str, tuple[float, float]]:
        """Returns type of tensor → (plain, fast) gradient's relative distance from float32.

        Raises RunError if the fast step's distance exceeds what the plain step's rounding allows.
        """
        draws, fast = [sum_by_type(tensors) for tensors in self.reference], sum_by_type(self.fast)
        reference = {kind: max(draw[kind].distance for draw in draws) for kind in fast}
        for kind, difference in fast.items():
            tolerance, rounding = HALF_TOLERANCES[1] / 10, reference[kind]
            lengths = [draw[kind].length for draw in draws]
            expected = min(max(difference.length, min(lengths)), max(lengths))
            longer = difference.length - expected
            if not (
                difference.distance <= tolerance + ROUNDING * rounding
                and abs(longer) <= tolerance + LENGTH * rounding
            ):
                raise create_mismatch_error(
                    f"gradients of {kind} are {difference.distance:.2g} from float32 and "
                    f"{longer:+.2%} longer, the plain step's {rounding:.2g}",
                    "the run's precision",
                )
        norms = norms_of(self.fast)
        for name, difference in self.fast.items():
            type_norm = reference[get_tensor_type(name)] * difference.reference**0.5
            tensor_norm = max(draw[name].difference for draw in self.reference) ** 0.5
            bound = HALF_TOLERANCES[1] * norms[name] + TENSOR_ROUNDING * max(tensor_norm, type_norm)
            if not difference.difference**0.5 <= bound:
                raise create_mismatch_error(
                    f"gradients of {name} are {difference.distance:.2g} from float32, the plain "
                    f"step's {tensor_norm / norms[name]:.2g}",
                    "the run's precision",
                )
        max_losses = {step: max(losses) for step, losses in self.losses.items()}
        if (
            max_losses
            and not max_losses["fast"] <= HALF_TOLERANCES[0] + TENSOR_ROUNDING * max_losses["plain"]
        ):
            raise create_mismatch_error(
                f"losses are {max_losses['fast']:.2g} from float32, the plain step's "
                f"{max_losses['plain']:.2g}",
                "the run's precision",
            )
        return {kind: (reference[kind], fast[kind].distance) for kind in fast}


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
        )
        ** 0.5
        for name, difference in differences.items()
        for kind in (get_tensor_type(name),)
    }


def create_mismatch_error(problem: str, dtype: str) -> RunError:
    """Build the error for a fast step unlike the plain one; `problem` is how they differ."""
    return RunError(
        f"--verify-fast: the fast step is not the plain one: in {dtype} {problem}. "
        "Train with --no-fast, and please report it with the command."
    )


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

    def perturbed_reference(self, rows: Sequence[Encoded], dtype: str, draw: int = 0) -> StepResult:
        """Returns the plain step's result with other rounding errors than `reference` has.

        Rows and answers are computed one by one in reverse order, and each block's input is
        perturbed by a random rounding error (seed `draw`), since rows of equal length round alike
        in any order, and errors shared by two answers cancel in the gradient.
        """
        is_paired = len(rows[0].sequences) > 1 and not isinstance(
            self.trainer.objective, StepObjective
        )
        model = _OneByOne(self.model) if is_paired else self.model
        with _perturbed_inputs(self.model, draw):
            return self._reference(model, rows[::-1], 1, dtype)

    def reference(self, rows: Sequence[Encoded], batch_size: int, dtype: str) -> StepResult:
        """Returns loss and gradients of the plain step: padded rows, PEFT's layers, no dropout."""
        return self._reference(self.model, rows, batch_size, dtype)

    def _reference(
        self, model: Any, rows: Sequence[Encoded], batch_size: int, dtype: str
    ) -> StepResult:
        objective, device = self.trainer.objective, self.trainer.args.device
        if isinstance(objective, StepObjective):
            return self._reference_whole_step(objective, rows, batch_size, dtype)
        loss_config = self.trainer.loss
        _evaluate(self.model)
        self.model.zero_grad()
        loss, kl_baseline = 0.0, self._baseline(rows, batch_size, dtype)
        micro_batches = self._batches(rows, batch_size)
        num_targets = [
            objective.training_count(batch["labels"], loss_config) for batch in micro_batches
        ]
        total = torch.stack(num_targets).sum(0)
        for batch in micro_batches:
            if kl_baseline is not None:
                batch["preference_labels"] = with_baseline(
                    batch["preference_labels"], kl_baseline.to(device)
                )
            with autocast(device.type, dtype):
                mask = batch["attention_mask"]
                summed, _, _ = compute_full_loss(model, objective, batch, mask, loss_config)
            batch_loss = (summed / total).sum()
            torch.autograd.backward(batch_loss)
            loss += batch_loss.item()
        return StepResult(loss, self._pop_gradients())

    def _reference_whole_step(
        self, objective: StepObjective, rows: Sequence[Encoded], batch_size: int, dtype: str
    ) -> StepResult:
        """Returns the plain step's result for a loss that needs all texts; all graphs are kept."""
        device = self.trainer.args.device
        _evaluate(self.model)
        self.model.zero_grad()
        texts, step = distinct_texts(rows)
        vectors, chunks = [], batches(texts, batch_size)
        for part, batch in zip(chunks, self._batches(texts, batch_size), strict=True):
            del batch["labels"]
            with autocast(device.type, dtype):
                outputs, unpooled = self.model(**batch), [text.unpooled for text in part]
                vectors.append(objective.embed(outputs, batch["attention_mask"], unpooled))
        loss = objective.step_loss(torch.cat(vectors), step)
        torch.autograd.backward(loss)
        return StepResult(loss.item(), self._pop_gradients())

    def _baseline(self, rows: Sequence[Encoded], batch_size: int, dtype: str) -> Tensor | None:
        """Returns the KTO baseline of a step (a scalar ≥ 0); None for other objectives."""
        objective, device = self.trainer.objective, self.trainer.args.device
        contrasts = [other for row in rows for other in row.contrasts]
        if not (isinstance(objective, LikelihoodObjective) and contrasts):
            return None
        with autocast(device.type, dtype):
            batches = self._batches(contrasts, batch_size)
            total = sum_log_ratios(None, self.model, objective, batches)
        return (total[0] / total[1]).clamp(min=0)

    def _batches(self, rows: Sequence[Encoded], batch_size: int) -> list[dict[str, Tensor]]:
        collate = Collator(self.pad_id)
        return [self.trainer.on_device(collate(part)) for part in batches(rows, batch_size)]

    def fast(self, rows: Sequence[Encoded], dtype: str) -> StepResult:
        """Returns the result of the Trainer's step, with fused layers and without dropout."""
        return self._run_trainer(rows, dtype, _without_dropout)

    def with_dropout(self, rows: Sequence[Encoded], dtype: str, *, fused: bool) -> StepResult:
        """Returns the Trainer's step result with dropout; masks are the same for either `fused`."""
        torch.manual_seed(0)
        return self._run_trainer(rows, dtype, _keep_mode if fused else _use_unfused_layers)

    def _run_trainer(
        self, rows: Sequence[Encoded], dtype: str, mode: Callable[[Any], None]
    ) -> StepResult:
        """Returns the Trainer's step result; `mode(model)` is called before each forward pass."""
        trainer, device = self.trainer, self.trainer.args.device
        self.model.zero_grad()
        before_forward = self.model.register_forward_pre_hook(lambda model, _: mode(model))
        with before_forward, trainer.standalone_steps(dtype):
            batch = trainer.data_collator(list(rows))
            trainer.prepare_step([batch], device)
            count = trainer.count_targets([batch], device) * trainer.args.world_size
            loss = trainer.training_step(self.model, batch, count)
        scale = trainer.loss_scale
        return StepResult(float(loss), {n: g / scale for n, g in self._pop_gradients().items()})

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
def _perturbed_inputs(model: Any, draw: int) -> Iterator[None]:
    """In the `with` block, perturb each block's input by rounding errors; `draw` is the seed."""
    generator = torch.Generator().manual_seed(draw)

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


def _evaluate(model: torch.nn.Module) -> None:
    """Set `model` to eval mode, except 8-bit layers, which round their inputs in that mode."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            module.training = True


def _keep_mode(model: torch.nn.Module) -> None:
    """Leave the model in training mode, with dropout."""


def _without_dropout(model: torch.nn.Module) -> None:
    _evaluate(model)
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
