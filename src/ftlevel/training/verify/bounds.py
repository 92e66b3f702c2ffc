"""How far apart two ways to compute a step may be, by what was measured of the plain one.

How far a gradient is from another one, by tensor and by kind of tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ftlevel.errors import RunError

Gradients = Mapping[str, torch.Tensor]

_COMPARED_AT_ONCE = 2**20
"""Elements whose differences are held in float64: an embedding's would take more than the model."""


@dataclass(frozen=True)
class Apart:
    """Sums over the elements of a gradient g and of its reference r; two of them can be added.

    Attributes:
        difference: Σ (g − r)².
        reference: Σ r².
        along: Σ g · r.
    """

    difference: float = 0.0
    reference: float = 0.0
    along: float = 0.0

    def __add__(self, other: Apart) -> Apart:
        """Return the sums over both."""
        return Apart(
            self.difference + other.difference,
            self.reference + other.reference,
            self.along + other.along,
        )

    @property
    def distance(self) -> float:
        """‖g − r‖ / ‖r‖: direction and length in one. 0 where both are 0, infinite where r is."""
        if self.reference == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / self.reference) ** 0.5)

    @property
    def length(self) -> float:
        """By how much g is too long along r: ⟨g, r⟩ / ⟨r, r⟩ − 1. Rounding averages out in it."""
        return self.along / self.reference - 1 if self.reference else 0.0


def compare_gradients(gradients: Gradients, reference: Gradients) -> dict[str, Apart]:
    """Return how far each tensor's gradient is from its reference; a missing one counts as zero."""
    found = {}
    for name in gradients.keys() | reference.keys():
        like = reference.get(name, gradients.get(name))
        if like is None:
            raise KeyError(name)
        zeros = torch.zeros((), dtype=like.dtype).expand_as(like)
        pair = [of.get(name, zeros).cpu().flatten() for of in (gradients, reference)]
        parts = zip(*(torch.split(tensor, _COMPARED_AT_ONCE) for tensor in pair), strict=True)
        found[name] = total(_compare(*part) for part in parts)
    return found


def _compare(gradient: torch.Tensor, reference: torch.Tensor) -> Apart:
    """Return the sums over two tensors on the CPU, in float64, which MPS has not."""
    g, r = gradient.double(), reference.double()
    return Apart(float((g - r).square().sum()), float(r.square().sum()), float((g * r).sum()))


def total(parts: Iterable[Apart]) -> Apart:
    """Return the sums over all of `parts`."""
    return sum(parts, Apart())


def kind_of(name: str) -> str:
    """Return what the tensors of all layers that `name` is one of have in common.

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


def by_kind(tensors: Mapping[str, Apart]) -> dict[str, Apart]:
    """Return the sums over the tensors of each kind."""
    kinds: dict[str, Apart] = defaultdict(Apart)
    for name, apart in tensors.items():
        kinds[kind_of(name)] += apart
    return dict(kinds)


def added(sums: Mapping[str, Apart], more: Mapping[str, Apart]) -> dict[str, Apart]:
    """Return the sums over both, by name."""
    return {name: sums.get(name, Apart()) + more.get(name, Apart()) for name in {**sums, **more}}


ORDER = 10.0
"""How far the fast step may be from the plain one, in multiples of what another order of the plain
step's sums does. Packed rows are summed in orders that differ more than padded ones do."""
LEAST = {"float32": (1e-5, 1e-4)}
"""What loss and gradients may differ by in any case, relative."""
LEAST_NARROW = (4e-3, 2e-2)
KINK = 2e-2
"""How far the fast step may be in float32 where rounding moves an activation over a kink, all
gradients together, relative: 6e-3 of one tensor was measured."""
DRAWS = 3
"""How often the plain step is rounded. Its gradients share few errors with one another, such as one
of all logits, so that a single draw may be near to float32, or of the right length, by chance."""
ROUNDING = 1.5
"""How far the fast step's rounded gradient may be from float32, in multiples of the farthest plain
one's: 1.1 at most was measured, and a tensor alone may be as far as `ROUNDING_OF_ONE`."""
ROUNDING_OF_ONE = 4.0
LENGTH = 0.3
"""How much longer than the longest plain one's, or shorter than the shortest, it may be, in
multiples of the same; 0.15 was measured."""


@dataclass
class Verified:
    """How far the fast step is from the plain one, relative to the plain one.

    Attributes:
        steps: how many steps were compared.
        rows: of them, in all.
        dtype: what they were computed in, beside the run's own precision.
        loss: largest difference of a step's loss.
        gradient: largest norm of the difference of a step's gradient over all trained tensors.
        dropout: the same with dropout on, fused layers against plain ones; None where there is none
            or it was not compared.
        exact: distance of the plain step's gradient from its own in float64, where that decided:
            `loss` and `gradient` are then the fast step's distances from that one.
        kinks: whether they are those of the fast step in float64, which in float32 is farther.
        rounded: kind of trained tensor → distances of the plain and of the fast step's gradient in
            the run's precision from the plain one's in float32.
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
    """How far a gradient may be from another one that differs in the order of its sums.

    Attributes:
        dtype: what both are computed in.
        noise: what another order does to each tensor.
        noise_of_loss: what it does to the loss, in nats.
    """

    dtype: str
    noise: Mapping[str, Apart]
    noise_of_loss: float

    def check_loss(self, loss: float, expected: float) -> float:
        """Return how far `loss` is from `expected`, relative.

        Raises:
            RunError: too far.
        """
        apart, least = abs(loss - expected), LEAST.get(self.dtype, LEAST_NARROW)[0]
        bound = least * abs(expected) + ORDER * self.noise_of_loss
        if not apart <= bound:
            raise wrong(f"losses differ by {apart:.2g} of {expected:.4g}, and rounding explains "
                         f"{bound:.2g}", self.dtype)  # fmt: skip
        return apart / max(abs(expected), 1e-12)

    def check_gradients(self, found: Mapping[str, Apart], what: str = "gradients") -> float:
        """Compare each tensor, and all of them; return how far these are apart.

        Raises:
            RunError: one is too far.
        """
        least = LEAST.get(self.dtype, LEAST_NARROW)[1]
        whole, norms = total(found.values()), norms_of(found)
        for name, apart in sorted(found.items(), key=lambda item: -item[1].difference):
            own = norms[name]
            bound = least * own + ORDER * self.noise[name].difference ** 0.5
            if not apart.difference**0.5 <= bound:
                raise wrong(f"{what} of {name} differ by {apart.distance:.2g}, their length by "
                             f"{apart.length:+.2%}, and rounding explains {bound / own:.2g}",
                             self.dtype)  # fmt: skip
        order = total(self.noise.values())
        bound = least / 2 + ORDER * order.distance
        if not whole.distance <= bound:
            raise wrong(f"{what} differ by {whole.distance:.2g}, and rounding explains "
                         f"{bound:.2g}", self.dtype)  # fmt: skip
        return whole.distance


@dataclass
class Rounding:
    """What the run's precision does to a gradient, over all steps that were compared.

    Attributes:
        plain: each tensor of the plain step against float32, of each draw of its rounding errors.
        fast: of the fast step likewise.
        losses: way → how far its losses are from float32's, relative.
    """

    plain: list[dict[str, Apart]] = field(default_factory=lambda: [{} for _ in range(DRAWS)])
    fast: dict[str, Apart] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def add_loss(self, way: str, loss: float, exact: float) -> None:
        """Keep how far a step's loss is from float32's."""
        self.losses.setdefault(way, []).append(abs(loss / exact - 1))

    def check(self) -> dict[str, tuple[float, float]]:
        """Return kind of tensor → distances of the plain and the fast step from float32.

        Raises:
            RunError: the fast step's is larger than rounding makes the plain one's.
        """
        draws, fast = [by_kind(tensors) for tensors in self.plain], by_kind(self.fast)
        plain = {kind: max(draw[kind].distance for draw in draws) for kind in fast}
        for kind, apart in fast.items():
            least, rounding = LEAST_NARROW[1] / 10, plain[kind]
            lengths = [draw[kind].length for draw in draws]
            nearest = min(max(apart.length, min(lengths)), max(lengths))
            longer = apart.length - nearest
            if not (
                apart.distance <= least + ROUNDING * rounding
                and abs(longer) <= least + LENGTH * rounding
            ):
                raise wrong(f"gradients of {kind} are {apart.distance:.2g} from float32 and "
                             f"{longer:+.2%} longer, the plain step's {rounding:.2g}",
                             "the run's precision")  # fmt: skip
        norms = norms_of(self.fast)
        for name, apart in self.fast.items():
            alike = plain[kind_of(name)] * apart.reference**0.5
            alone = max(draw[name].difference for draw in self.plain) ** 0.5
            bound = LEAST_NARROW[1] * norms[name] + ROUNDING_OF_ONE * max(alone, alike)
            if not apart.difference**0.5 <= bound:
                raise wrong(f"gradients of {name} are {apart.distance:.2g} from float32, the plain "
                             f"step's {alone / norms[name]:.2g}",
                             "the run's precision")  # fmt: skip
        worst = {way: max(losses) for way, losses in self.losses.items()}
        if worst and not worst["fast"] <= LEAST_NARROW[0] + ROUNDING_OF_ONE * worst["plain"]:
            raise wrong(f"losses are {worst['fast']:.2g} from float32, the plain step's "
                         f"{worst['plain']:.2g}", "the run's precision")  # fmt: skip
        return {kind: (plain[kind], fast[kind].distance) for kind in fast}


def norms_of(found: Mapping[str, Apart]) -> dict[str, float]:
    """Return of each tensor the norm of its reference that a rounding error is measured by.

    A tensor with next to no gradient is rounded like its neighbours that have one, and like all:
    the bias of a span's logits has none, and sums what rounding left of it; nor have the keys of
    an attention that is saturated.
    """
    counts: dict[str, int] = {}
    for name in found:
        counts[kind_of(name)] = counts.get(kind_of(name), 0) + 1
    kinds, whole = by_kind(found), total(found.values()).reference
    return {
        name: max(apart.reference, 1e-4 * kinds[kind].reference / counts[kind], 1e-4 * whole) ** 0.5
        for name, apart in found.items()
        for kind in (kind_of(name),)
    }


def wrong(what: str, dtype: str) -> RunError:
    """Return the error that stops a run."""
    return RunError(
        f"--verify-fast: the fast step is not the plain one: in {dtype} {what}. "
        "Train with --no-fast, and please report it with the command."
    )
