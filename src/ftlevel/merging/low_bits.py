"""A merged model in the 4 or 8 bits that are served.

The weights that a quantized run was trained on lie on the grid of its codes, and what was trained
is far smaller than half a step of it: rounding them again gives the base without the adapter. The
weights before quantization lie anywhere between two codes, so that the same change, added to them,
takes a fair share of them to the next code, and its mean survives. From there the codes are moved
until the layers give on rows what they give as trained (`weights.codes`).

What the linears of a model are given: the second moment of each one's inputs, over rows.

The model is asked as often as memory makes it necessary: a moment is (in, in) in float32, and those
of a large model are larger than its weights. Linears that are given the same tensor share one.

The codes of a .gguf file's matrices, by what the layers of the run give on its rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ftlevel.config import MergeConfig, QuantConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.errors import InputError, RunError
from ftlevel.evaluation.scoring import batches
from ftlevel.evaluation.two_models import Agreement, Probe, Scores, compare_rows
from ftlevel.events import Listener
from ftlevel.merging.merge_input import MergeInput
from ftlevel.merging.merged_model import open_merger
from ftlevel.merging.verify import Candidate, load_merged
from ftlevel.models.hardware import DTYPES, autocast
from ftlevel.models.loading import load_config
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.quantizers import dequantized
from ftlevel.weights.codes import Grid, choose_codes
from ftlevel.weights.gguf.file import GRIDS, Codes
from ftlevel.weights.quantize_layout import Layout, build_layout
from ftlevel.weights.quantize_shards import bitsandbytes_grid, write_quantized

MOST_BYTES = 1 << 30
_BATCH = 4


@dataclass
class InputMoments:
    """H = E[x xᵀ] of the inputs of linears, made when it is asked for.

    Attributes:
        model: in eval mode.
        probe: the rows, and how the model is asked.
        dtype: compute precision's name.
        sizes: linear → how many inputs it has, in the order in which they will be asked for.
        passes: how often the model was asked.
    """

    model: Any
    probe: Probe
    dtype: str
    sizes: Mapping[str, int]
    passes: int = 0
    _held: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def of(self, name: str) -> torch.Tensor | None:
        """Return H of the linear `name`, (in, in) in float32 on the CPU; None if none used it."""
        if name not in self._held:
            self._held = {}
            self._held = self._ask(self._group(name))
            self.passes += 1
        return self._held[name]

    def _group(self, first: str) -> list[str]:
        """Return `first` and what follows it, as many as memory is for."""
        names, size = list(self.sizes), 0
        group: list[str] = []
        for name in names[names.index(first) :]:
            size += 4 * self.sizes[name] ** 2
            if group and size > MOST_BYTES:
                break
            group.append(name)
        return group

    def _ask(self, names: list[str]) -> dict[str, torch.Tensor | None]:
        sums = _Sums()
        hooks = [self.model.get_submodule(n).register_forward_pre_hook(sums.hook(n)) for n in names]
        collate, device = Collator(self.probe.pad_id), self.probe.device
        try:
            with torch.no_grad(), autocast(device, self.dtype):
                for rows in batches(self.probe.rows, _BATCH):
                    batch = {name: value.to(device) for name, value in collate(rows).items()}
                    sums.mask = batch["attention_mask"].bool()
                    self.model(**self.probe.objective.split(batch)[0])
        finally:
            for hook in hooks:
                hook.remove()
        sums.finish()
        return {name: sums.means.get(sums.slots.get(name, "")) for name in names}


@dataclass
class _Sums:
    """Σ x xᵀ by the linear that was given x first.

    Attributes:
        slots: linear → the one that it shares its inputs with, or itself.
        means: of the latter, the sums and at the end the means.
        mask: (batch, seq), the positions that are no padding.
    """

    slots: dict[str, str] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    _last: tuple[Any, str] = (None, "")
    _counts: dict[str, int] = field(default_factory=dict)

    def hook(self, name: str) -> Any:
        """Return what sees the inputs of the linear `name`."""

        def see(_: Any, inputs: tuple[Any, ...]) -> None:
            given, slot = self._last
            if inputs[0] is given:
                self.slots[name] = slot
                return
            self._last = (inputs[0], name)
            self.slots[name] = name
            self._add(name, inputs[0])

        return see

    def _add(self, name: str, given: torch.Tensor) -> None:
        mask = self.mask
        fits = mask is not None and given.shape[:2] == mask.shape
        rows = (given[mask] if fits else given.reshape(-1, given.shape[-1])).float()
        with torch.autocast(rows.device.type, enabled=False):  # which would round the sums
            total = (rows.T @ rows).cpu()
        self.means[name] = self.means[name].add_(total) if name in self.means else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def finish(self) -> None:
        """Make means of the sums."""
        for name, total in self.means.items():
            total /= max(self._counts[name], 1)


_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LowBits:
    """A merged model that was written in few bits.

    Attributes:
        linears: how many weights are packed.
        layout: what was quantized.
        sums: linear → its weights, as they must be read back, times signs: (out,).
    """

    linears: int
    layout: Layout
    sums: dict[str, torch.Tensor]


class Weights(Protocol):
    """The weights of a model that is written: `TensorMerger`, or a model as it is."""

    def adapts(self, name: str) -> bool:
        """Whether the tensor `name` is another one than it was before."""

    def unrounded(self, name: str) -> torch.Tensor | None:
        """Return the tensor `name` as it is written; None where the model has none."""

    def base(self, name: str) -> torch.Tensor:
        """Return the tensor `name` before merging, as it was in training."""


@dataclass
class CodeChooser:
    """Chooses the codes of each linear.

    Attributes:
        target: makes the weights as trained.
        origin: makes the weights before quantization with what was trained.
        grid: what is stored.
        turned: linear → whether its weight is (in, out), as Conv1D has it.
        dtype: in which the weights are loaded before they are quantized.
        moments: of the linears' inputs; None rounds without looking at them.
        fits_scales: whether scales are chosen by the moments, too.
        sums: as of `LowBits` (mutated).
    """

    target: Weights
    origin: Weights
    grid: Grid
    turned: dict[str, bool]
    dtype: torch.dtype
    moments: InputMoments | None
    fits_scales: bool = False
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, linear: str, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return codes and scales of a linear; None where its blocks are not whole."""
        return self.choose(linear) if self.grid.fits(written.shape) else None

    def choose(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of a linear of whole blocks."""
        origin = self._turn(self.origin.unrounded(f"{linear}.weight"), linear)
        if not self.target.adapts(f"{linear}.weight"):
            origin = origin.to(self.dtype).float()  # as it was quantized for training
        moment = self.moments.of(linear) if self.moments else None
        if moment is not None and self.fits_scales:
            scales = self.grid.fitted_scales(origin, moment)
        else:
            scales = self.grid.scales_of(origin)
        stored = self.grid.stored(scales)
        codes = self.grid.nearest(origin, scales)
        if moment is not None:
            weight = self._turn(self.target.unrounded(f"{linear}.weight"), linear)
            change = weight - self._turn(self.target.base(f"{linear}.weight"), linear)
            codes = choose_codes(weight, change, codes, stored, moment, self.grid)
        self.sums[linear] = self.grid.value(codes, stored) @ _signs(codes.shape[1])
        return codes, scales

    def _turn(self, weight: torch.Tensor | None, linear: str) -> torch.Tensor:
        """Return `weight` as (out, in) in float32."""
        if weight is None:
            raise ValueError(f"{linear} is a linear of the model that was merged")
        return (weight.T if self.turned[linear] else weight).float().contiguous()


def resolve_low_bits(config: MergeConfig, inputs: MergeInput) -> QuantConfig | None:
    """Return the quantization of what is written; None for floating point.

    Raises:
        InputError: the model has nothing that can be quantized.
    """
    if config.quant == "none":
        return None
    own = inputs.quant if inputs.quant.kind == config.quant else QuantConfig(kind=config.quant)
    given = {"quant_type": config.quant_type, "double_quant": config.double_quant}
    told = {name: value for name, value in given.items() if value is not None}
    low = own.model_copy(update={**told, "experts": None})  # no checkpoint holds packed experts
    _plan_layout(inputs, inputs.config, low, DTYPES[inputs.dtype])
    return low


def _plan_layout(inputs: MergeInput, config: Any, quant: QuantConfig, dtype: torch.dtype) -> Layout:
    wish = build_quantization_config(quant, dtype, [])
    layout = build_layout(config, inputs.auto_class, wish, dtype)
    if not layout.linears:
        raise InputError(
            f"--quant {quant.kind}: {config.model_type} has no linear layer that bitsandbytes can "
            "quantize. Drop it."
        )
    return layout


def write_low_bits(
    merged: Candidate,
    inputs: MergeInput,
    quant: QuantConfig,
    rows: Probe | None,
    listener: Listener,
) -> tuple[Candidate, LowBits]:
    """Put the merged model in few bits into its own place, and return both.

    Args:
        merged: in floating point, onto the weights that the run was trained on; its directory is
            taken away.
        inputs: the adapter and its base.
        quant: how it is quantized.
        rows: on which the layers' outputs count; None rounds each weight by itself.
        listener: told the number of tensors done.

    Raises:
        RunError: nothing could be quantized.
    """
    directory = merged.directory.with_name(".low-bits")
    directory.mkdir()
    listener.begin(0)
    place = str(merged.directory)
    config = load_config(ModelSource(place, "directory", place, local_files_only=True))
    dtype = DTYPES[merged.written.dtype]
    layout = _plan_layout(inputs, config, quant, dtype)
    origin = merged.merger
    if merged.onto != "original" and _on_one_grid(quant, inputs.quant):
        origin = open_merger(inputs, None, None)
    moments = None
    if rows is not None:
        sizes = {
            name: layout.parameters[f"{name}.weight"].shape[0 if turned else 1]
            for name, turned in layout.linears.items()
        }
        moments = InputMoments(load_merged(merged.directory, inputs), rows, inputs.dtype, sizes)
    grid = bitsandbytes_grid(layout.config)
    chooser = CodeChooser(
        merged.merger, origin, grid, layout.linears, DTYPES[inputs.dtype], moments
    )
    layout, written = write_quantized(merged.directory, directory, layout, listener.step, chooser)
    if not written.quantized:
        raise RunError(f"no linear of the merged {config.model_type} could be quantized.")
    for path in merged.directory.iterdir():
        if ".safetensors" not in path.name and not (directory / path.name).exists():
            shutil.move(path, directory / path.name)
    shutil.rmtree(merged.directory)
    rounded = replace(
        merged,
        directory=directory,
        written=replace(merged.written, size_bytes=written.bytes),
    )
    return rounded, LowBits(written.quantized, layout, chooser.sums)


def _on_one_grid(one: QuantConfig, other: QuantConfig) -> bool:
    """Whether what is stored as `one` lies on the grid of `other`, where rounding undoes training.

    On another grid the weights as trained lie between codes, and those before quantization are
    farther from them than this rounding takes them.
    """
    return (one.kind, one.quant_type) == (other.kind, other.quant_type)


def measure_low_bits(
    rounded: Candidate, low: LowBits, inputs: MergeInput, probe: Probe, trained: Scores
) -> Agreement:
    """Return how far what was written, loaded afresh, is from the model as trained.

    Raises:
        RunError: bitsandbytes reads other weights than were chosen.
    """
    model = load_merged(rounded.directory, inputs)
    _check_read_back(model, low)
    return compare_rows(trained, probe.score(model, inputs.dtype))


def _check_read_back(model: Any, low: LowBits) -> None:
    for name, expected in low.sums.items():
        weight = dequantized(model.get_submodule(name)).cpu()
        found = weight @ _signs(weight.shape[1])
        if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            raise RunError(
                f"the files are not what was chosen: {name}, loaded afresh, has other weights. "
                "Nothing was kept. Please report this with the command."
            )


def _signs(count: int) -> torch.Tensor:
    """Return `count` fixed signs, by which a matrix is known without keeping it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


@dataclass
class GgufCodes:
    """Chooses codes, and keeps them (a byte a weight): what is written is compared with them.

    Attributes:
        chooser: chooses those of a linear.
    """

    chooser: CodeChooser
    _made: dict[str, Codes] = field(default_factory=dict)

    def __call__(self, source: str) -> Codes:
        """Return the codes of the weight `source`, (out, in)."""
        if source not in self._made:
            codes, scales = self.chooser.choose(source.removesuffix(".weight"))
            self._made[source] = Codes(codes.to(torch.uint8), scales.view(len(codes), -1))
        return self._made[source]


@dataclass(frozen=True)
class WeightsAsLoaded:
    """The weights of a model that is written as it is, as `CodeChooser` asks for them.

    Attributes:
        model: as it was loaded.
    """

    model: Any

    def adapts(self, name: str) -> bool:  # noqa: ARG002
        """Whether the tensor `name` is another one than it was before: it is taken as it is."""
        return True

    def unrounded(self, name: str) -> torch.Tensor | None:
        """Return the tensor `name`."""
        return self.base(name)

    def base(self, name: str) -> torch.Tensor:
        """Return the tensor `name`, which nothing is merged into."""
        return self.model.get_parameter(name).detach().cpu()


def choose_gguf_codes(
    model: Any, weights: Weights, rows: Probe, dtype: str, outtype: str
) -> Callable[[str], Codes]:
    """Return what chooses the codes of the model's linears.

    The weights of a quantized run lie between the codes of another grid, and those before
    quantization are no better a start, so what is rounded first is the model as trained.

    Args:
        model: as it is written, whole.
        weights: of it, as trained.
        rows: on which the layers' outputs count.
        dtype: compute precision's name.
        outtype: a key of `GRIDS`.
    """
    turned, sizes = {}, {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            turned[name] = type(module).__name__ == "Conv1D"
            sizes[name] = weight.shape[0 if turned[name] else 1]
    moments = InputMoments(model, rows, dtype, sizes)
    grid = GRIDS[outtype]
    return GgufCodes(
        CodeChooser(weights, weights, grid, turned, DTYPES[dtype], moments, fits_scales=True)
    )
