"""Distances between gradients, and the bounds of these for a correct fast step.

Bounds are multiples of the measured rounding errors of the plain step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftlevel.errors import RunError

Gradients = Mapping[str, Tensor]

_COMPARED_AT_ONCE = 2**20
"""Elements that are compared in float64 at once; a whole embedding would take more memory than the
model."""


@dataclass(frozen=True)
class GradientDifference:
    """Sums over the elements of a gradient g and of its reference r; they can be added.

    Attributes:
        difference: Σ (g − r)².
        reference: Σ r².
        along: Σ g · r.
    """

    difference: float = 0.0
    reference: float = 0.0
    along: float = 0.0

    def __add__(self, other: GradientDifference) -> GradientDifference:
        """Return the sums over both."""
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
        """Relative excess length of g along r, ⟨g, r⟩ / ⟨r, r⟩ − 1, where rounding averages out."""
        return self.along / self.reference - 1 if self.reference else 0.0


def compare_gradients(gradients: Gradients, reference: Gradients) -> dict[str, GradientDifference]:
    """Return the difference of each tensor's gradient from its reference; a missing one is zero."""
    differences = {}
    for name in gradients.keys() | reference.keys():
        like = reference.get(name, gradients.get(name))
        if like is None:
            raise KeyError(name)
        zeros = torch.zeros((), dtype=like.dtype).expand_as(like)
        pair = [of.get(name, zeros).cpu().flatten() for of in (gradients, reference)]
        parts = zip(*(torch.split(tensor, _COMPARED_AT_ONCE) for tensor in pair), strict=True)
        differences[name] = total(_compare(*part) for part in parts)
    return differences


def _compare(gradient: Tensor, reference: Tensor) -> GradientDifference:
    """Return the sums over two CPU tensors in float64, which MPS does not support."""
    g, r = gradient.double(), reference.double()
    return GradientDifference(
        float((g - r).square().sum()), float(r.square().sum()), float((g * r).sum())
    )


def total(parts: Iterable[GradientDifference]) -> GradientDifference:
    """Return the sums over all of `parts`."""
    return sum(parts, GradientDifference())


def kind_of(name: str) -> str:
    """Return the part of a tensor's name that is the same in all layers.

    `base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight` is a `lora_A`.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    if parts[-1] in ("weight", "bias") and len(parts) > 1 and "default" in parts[-2]:
        parts = parts[:-2] + ([parts[-1]] if parts[-1] == "bias" else [])
    if parts[-1] == "default":
        parts = parts[:-1]
    if parts[-1] in ("weight", "bias") and len(parts) > 1:
        return f"{re.sub(r'_?[0-9]+$', '', parts[-2])}.{parts[-1]}"
    return parts[-1]


def by_kind(tensors: Mapping[str, GradientDifference]) -> dict[str, GradientDifference]:
    """Return the sums over the tensors of each kind."""
    sums: dict[str, GradientDifference] = defaultdict(GradientDifference)
    for name, difference in tensors.items():
        sums[kind_of(name)] += difference
    return dict(sums)


def added(
    sums: Mapping[str, GradientDifference], other: Mapping[str, GradientDifference]
) -> dict[str, GradientDifference]:
    """Return the sums over both mappings, by name."""
    return {
        name: sums.get(name, GradientDifference()) + other.get(name, GradientDifference())
        for name in {**sums, **other}
    }


ORDER = 10.0
"""Maximal distance of the fast step from the plain one, as a multiple of the effect of another
summation order on the plain step. Orders differ more for packed rows than for padded ones."""
LEAST = {"float32": (1e-5, 1e-4)}
"""Relative differences of loss and gradients that are always accepted."""
LEAST_NARROW = (4e-3, 2e-2)
KINK = 2e-2
"""Maximal relative distance of all gradients in float32 if rounding moves an activation over a
kink; 6e-3 was measured for one tensor."""
DRAWS = 3
"""Number of rounded plain steps. Gradients share a few errors, such as one of all logits, so a
single step may be close to float32, or of the right length, by chance."""
ROUNDING = 1.5
"""Maximal distance of the fast step's rounded gradient from float32, as a multiple of the plain
steps' largest; 1.1 was measured. For a single tensor it is `ROUNDING_OF_ONE`."""
ROUNDING_OF_ONE = 4.0
LENGTH = 0.3
"""Maximal length outside the range of the plain steps' lengths, as a multiple of the same distance;
0.15 was measured."""


@dataclass
class StepComparison:
    """Differences between fast and plain step, relative to the plain step.

    Attributes:
        dtype: compute dtype of the comparison, in addition to the run's own.
        gradient: largest norm of the gradient difference over all trainable tensors.
        dropout: the same with dropout, for fused and plain layers; None if not compared.
        exact: distance of the plain step's gradient from float64, if that decided. `loss` and
            `gradient` are then distances of the fast step from float64.
        kinks: whether these are of the fast step in float64, which is farther off in float32.
        rounded: kind of tensor → distances of plain and fast gradient in the run's dtype from
            float32.
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
    """Maximal differences of two steps that differ in summation order only.

    `noise` is the change of each tensor's gradient by another order, `noise_of_loss` that of the
    loss in nats.
    """

    dtype: str
    noise: Mapping[str, GradientDifference]
    noise_of_loss: float

    def check_loss(self, loss: float, expected: float) -> float:
        """Return the relative difference of `loss` from `expected`.

        Raises:
            RunError: it exceeds the bound.
        """
        difference, tolerance = abs(loss - expected), LEAST.get(self.dtype, LEAST_NARROW)[0]
        bound = tolerance * abs(expected) + ORDER * self.noise_of_loss
        if not difference <= bound:
            raise build_mismatch_error(
                f"losses differ by {difference:.2g} of {expected:.4g}, and rounding explains "
                f"{bound:.2g}",
                self.dtype,
            )
        return difference / max(abs(expected), 1e-12)

    def check_gradients(
        self, differences: Mapping[str, GradientDifference], what: str = "gradients"
    ) -> float:
        """Check each tensor and all together, and return the distance of all.

        Raises:
            RunError: a distance exceeds its bound.
        """
        tolerance = LEAST.get(self.dtype, LEAST_NARROW)[1]
        overall, norms = total(differences.values()), norms_of(differences)
        for name, difference in sorted(differences.items(), key=lambda item: -item[1].difference):
            norm = norms[name]
            bound = tolerance * norm + ORDER * self.noise[name].difference ** 0.5
            if not difference.difference**0.5 <= bound:
                raise build_mismatch_error(
                    f"{what} of {name} differ by {difference.distance:.2g}, their length by "
                    f"{difference.length:+.2%}, and rounding explains {bound / norm:.2g}",
                    self.dtype,
                )
        order = total(self.noise.values())
        bound = tolerance / 2 + ORDER * order.distance
        if not overall.distance <= bound:
            raise build_mismatch_error(
                f"{what} differ by {overall.distance:.2g}, and rounding explains {bound:.2g}",
                self.dtype,
            )
        return overall.distance


@dataclass
class RoundingErrors:
    """Effect of the run's dtype on gradients and losses, as differences from float32.

    `plain` has one item per draw; `losses` maps "plain" and "fast" to relative differences.
    """

    plain: list[dict[str, GradientDifference]] = field(
        default_factory=lambda: [{} for _ in range(DRAWS)]
    )
    fast: dict[str, GradientDifference] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add_loss(self, step: str, loss: float, exact: float) -> None:
        """Record the relative difference of a step's loss from float32."""
        self.losses.setdefault(step, []).append(abs(loss / exact - 1))

    def check(self) -> dict[str, tuple[float, float]]:
        """Return kind of tensor → distances of the plain and the fast step from float32.

        Raises RunError if the fast step's exceeds the bound from the plain step's rounding.
        """
        draws, fast = [by_kind(tensors) for tensors in self.plain], by_kind(self.fast)
        plain = {kind: max(draw[kind].distance for draw in draws) for kind in fast}
        for kind, difference in fast.items():
            tolerance, rounding = LEAST_NARROW[1] / 10, plain[kind]
            lengths = [draw[kind].length for draw in draws]
            nearest = min(max(difference.length, min(lengths)), max(lengths))
            longer = difference.length - nearest
            if not (
                difference.distance <= tolerance + ROUNDING * rounding
                and abs(longer) <= tolerance + LENGTH * rounding
            ):
                raise build_mismatch_error(
                    f"gradients of {kind} are {difference.distance:.2g} from float32 and "
                    f"{longer:+.2%} longer, the plain step's {rounding:.2g}",
                    "the run's precision",
                )
        norms = norms_of(self.fast)
        for name, difference in self.fast.items():
            alike = plain[kind_of(name)] * difference.reference**0.5
            alone = max(draw[name].difference for draw in self.plain) ** 0.5
            bound = LEAST_NARROW[1] * norms[name] + ROUNDING_OF_ONE * max(alone, alike)
            if not difference.difference**0.5 <= bound:
                raise build_mismatch_error(
                    f"gradients of {name} are {difference.distance:.2g} from float32, the plain "
                    f"step's {alone / norms[name]:.2g}",
                    "the run's precision",
                )
        worst = {step: max(losses) for step, losses in self.losses.items()}
        if worst and not worst["fast"] <= LEAST_NARROW[0] + ROUNDING_OF_ONE * worst["plain"]:
            raise build_mismatch_error(
                f"losses are {worst['fast']:.2g} from float32, the plain step's "
                f"{worst['plain']:.2g}",
                "the run's precision",
            )
        return {kind: (plain[kind], fast[kind].distance) for kind in fast}


def norms_of(differences: Mapping[str, GradientDifference]) -> dict[str, float]:
    """Return the norm of each tensor's reference, at least 1 % of its kind's mean and of the total.

    Rounding errors of tensors with almost no gradient, such as the bias of span logits or the keys
    of saturated attention, are as large as those of other tensors.
    """
    counts: dict[str, int] = {}
    for name in differences:
        counts[kind_of(name)] = counts.get(kind_of(name), 0) + 1
    kinds, total_reference = by_kind(differences), total(differences.values()).reference
    return {
        name: max(
            difference.reference,
            1e-4 * kinds[kind].reference / counts[kind],
            1e-4 * total_reference,
        )
        ** 0.5
        for name, difference in differences.items()
        for kind in (kind_of(name),)
    }


def build_mismatch_error(problem: str, dtype: str) -> RunError:
    """Build the error that stops a run whose fast step differs from the plain step."""
    return RunError(
        f"--verify-fast: the fast step is not the plain one: in {dtype} {problem}. "
        "Train with --no-fast, and please report it with the command."
    )
