"""Quantize a merged model to 4-bit or 8-bit, or its matrices to a .gguf type.

H = E[x xᵀ] over the inputs x of a linear layer on sample rows. `weights.codes` uses H to select
codes that preserve the layer's outputs. If a quantized base plus the update were rounded to the
base's own grid, the update would be lost, as it is far smaller than half a step. Therefore codes
are first rounded from the update merged into the base's weights before quantization.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ftlevel.config import MergeConfig, QuantConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.errors import InputError, RunError
from ftlevel.evaluation.two_models import Agreement, EvalSet, RowLogits, compare_logits
from ftlevel.events import Listener
from ftlevel.merging.merge_input import MergeInput
from ftlevel.merging.merged_model import TensorMerger, open_merger
from ftlevel.merging.verify import Candidate, load_merged
from ftlevel.models.hardware import DTYPES, autocast
from ftlevel.models.loading import load_config
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream.quantizers import dequantized
from ftlevel.trained.generation import batches
from ftlevel.weights.codes import QuantizationGrid, select_codes
from ftlevel.weights.quantize_shards import (
    QuantizedLayout,
    bitsandbytes_grid,
    build_layout,
    count_tensors,
    save_quantized,
)

MAX_BYTES = 1 << 30
_BATCH = 4


@dataclass
class InputMoments:
    """H = E[x xᵀ] of the inputs of linear layers, computed on first access.

    `sizes` maps layers, in the order of access, to their input size. The rows are passed several
    times, each time for some layers, to bound memory: each H is (in, in).
    """

    model: Any
    eval_set: EvalSet
    dtype: str
    sizes: Mapping[str, int]
    passes: int = 0
    _cache: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def of(self, name: str) -> torch.Tensor | None:
        """Returns H `(in, in)` of layer `name`, float32 on the CPU; None if no row reached it."""
        if name not in self._cache:
            self._cache = {}
            self._cache = self._compute(self._group(name))
            self.passes += 1
        return self._cache[name]

    def _group(self, first: str) -> list[str]:
        """Returns `first` and the next layers whose H matrices fit into `MAX_BYTES` together."""
        names, size = list(self.sizes), 0
        group: list[str] = []
        for name in names[names.index(first) :]:
            size += 4 * self.sizes[name] ** 2
            if group and size > MAX_BYTES:
                break
            group.append(name)
        return group

    def _compute(self, names: list[str]) -> dict[str, torch.Tensor | None]:
        sums = _Sums()
        hooks = [self.model.get_submodule(n).register_forward_pre_hook(sums.hook(n)) for n in names]
        collate, device = Collator(self.eval_set.pad_id), self.eval_set.device
        try:
            with torch.no_grad(), autocast(device, self.dtype):
                for rows in batches(self.eval_set.rows, _BATCH):
                    batch = {name: value.to(device) for name, value in collate(rows).items()}
                    sums.mask = batch["attention_mask"].bool()
                    self.model(**self.eval_set.objective.split(batch)[0])
        finally:
            for hook in hooks:
                hook.remove()
        sums.average()
        return {name: sums.means.get(sums.slots.get(name, "")) for name in names}


@dataclass
class _Sums:
    """Σ x xᵀ over the inputs x of each linear layer; layers with the same input share one sum."""

    slots: dict[str, str] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    _last: tuple[Any, str] = (None, "")
    _counts: dict[str, int] = field(default_factory=dict)

    def hook(self, name: str) -> Any:
        """Returns a forward pre-hook that adds the inputs of the linear layer `name` to its sum."""

        def add_inputs(_: Any, inputs: tuple[Any, ...]) -> None:
            last_inputs, slot = self._last
            if inputs[0] is last_inputs:
                self.slots[name] = slot
                return
            self._last = (inputs[0], name)
            self.slots[name] = name
            self._add(name, inputs[0])

        return add_inputs

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        mask = self.mask
        is_masked = mask is not None and inputs.shape[:2] == mask.shape
        rows = (inputs[mask] if is_masked else inputs.reshape(-1, inputs.shape[-1])).float()
        with torch.autocast(rows.device.type, enabled=False):  # autocast would round the sums
            total = (rows.T @ rows).cpu()
        self.means[name] = self.means[name].add_(total) if name in self.means else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def average(self) -> None:
        """Divide each sum by the number of inputs x that it contains."""
        for name, total in self.means.items():
            total /= max(self._counts[name], 1)


_TOLERANCE = 1e-4


@dataclass(frozen=True)
class WeightsAsLoaded:
    """Source of weights for `CodeSelector`: those of a loaded model that has no adapter."""

    model: Any

    def adapts(self, name: str) -> bool:  # noqa: ARG002
        """Returns True, so that the weights are used as loaded."""
        return True

    def unrounded(self, name: str) -> torch.Tensor | None:
        """Returns the same as `base`, because nothing is merged or rounded."""
        return self.base(name)

    def base(self, name: str) -> torch.Tensor:
        """Returns the tensor `name`; nothing is merged into it."""
        return self.model.get_parameter(name).detach().cpu()


Weights = TensorMerger | WeightsAsLoaded
"""Source of the weights of the model to write."""


@dataclass
class CodeSelector:
    """Callable that selects the quantization codes of each linear layer.

    Attributes:
        target: weights as trained, whose outputs the codes preserve.
        source: weights that the codes are first rounded from.
        transposed: linear layer → whether its weight is (in, out), as in Conv1D.
        dtype: precision in which the weights were loaded before they were quantized.
        moments: input moments; None rounds each weight to the nearest code.
        fits_scales: whether the scales depend on the moments, too.
        sums: layer → checksum `(out,)` to compare after reloading: W @ s for the weight W and fixed
            random signs s; each call adds one.
    """

    target: Weights
    source: Weights
    grid: QuantizationGrid
    transposed: dict[str, bool]
    dtype: torch.dtype
    moments: InputMoments | None
    fits_scales: bool = False
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, linear: str, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns codes and scales of layer `linear`; None if blocks do not divide its size."""
        return self.select(linear) if self.grid.fits(written.shape) else None

    def select(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns codes and scales of layer `linear`; its size is a multiple of the block size."""
        source = self._to_out_in(self.source.unrounded(f"{linear}.weight"), linear)
        if not self.target.adapts(f"{linear}.weight"):
            source = source.to(self.dtype).float()  # precision before quantization in training
        moment = self.moments.of(linear) if self.moments else None
        if moment is not None and self.fits_scales:
            scales = self.grid.fitted_scales(source, moment)
        else:
            scales = self.grid.scales_of(source)
        rounded_scales = self.grid.stored(scales)
        codes = self.grid.nearest(source, scales)
        if moment is not None:
            weight = self._to_out_in(self.target.unrounded(f"{linear}.weight"), linear)
            update = weight - self._to_out_in(self.target.base(f"{linear}.weight"), linear)
            codes = select_codes(weight, update, codes, rounded_scales, moment, self.grid)
        self.sums[linear] = self.grid.value(codes, rounded_scales) @ _signs(codes.shape[1])
        return codes, scales

    def _to_out_in(self, weight: torch.Tensor | None, linear: str) -> torch.Tensor:
        if weight is None:
            raise ValueError(f"{linear} is a linear of the model that was merged")
        return (weight.T if self.transposed[linear] else weight).float().contiguous()


def resolve_quantization(config: MergeConfig, inputs: MergeInput) -> QuantConfig | None:
    """Returns how to quantize the saved model, None if not; InputError if no layer can be."""
    if config.quant == "none":
        return None
    base = inputs.quant if inputs.quant.kind == config.quant else QuantConfig(kind=config.quant)
    options = {"quant_type": config.quant_type, "double_quant": config.double_quant}
    values = {name: value for name, value in options.items() if value is not None}
    # Saved checkpoints cannot contain packed experts.
    quant = base.model_copy(update={**values, "experts": None})
    _plan_layout(inputs, inputs.ref.model_config, quant, DTYPES[inputs.dtype])
    return quant


def _plan_layout(
    inputs: MergeInput, config: Any, quant: QuantConfig, dtype: torch.dtype
) -> QuantizedLayout:
    quantization = build_quantization_config(quant, dtype, [])
    layout = build_layout(config, inputs.ref.auto_class, quantization, dtype)
    if not layout.linears:
        raise InputError(
            f"--quant {quant.kind}: {config.model_type} has no linear layer that bitsandbytes can "
            "quantize. Drop it."
        )
    return layout


def quantize_merged(
    merged: Candidate,
    inputs: MergeInput,
    quant: QuantConfig,
    rows: EvalSet | None,
    listener: Listener,
) -> tuple[Candidate, dict[str, torch.Tensor]]:
    """Quantize the merged model into a new directory, and delete the directory of `merged`.

    Codes are selected to preserve the layers' outputs on `rows`; None rounds each weight. The
    listener receives the number of finished tensors. Also returns the layers' checksums. Raises
    RunError if no layer is quantized.
    """
    output_dir = merged.directory.with_name(".low-bits")
    output_dir.mkdir()
    listener.begin(count_tensors(merged.directory))
    config = load_config(resolve_source(str(merged.directory)))
    layout = _plan_layout(inputs, config, quant, DTYPES[merged.written.dtype])
    source = merged.merger
    # On the grid of training, rounding would undo training; on another grid the trained weights lie
    # between codes and can be rounded directly.
    trained = inputs.quant
    is_same_grid = (quant.kind, quant.quant_type) == (trained.kind, trained.quant_type)
    if merged.onto != "original" and is_same_grid:
        source = open_merger(inputs, None, None)
    moments = None
    if rows is not None:
        sizes = {
            name: layout.parameters[f"{name}.weight"].shape[0 if transposed else 1]
            for name, transposed in layout.linears.items()
        }
        moments = InputMoments(load_merged(merged.directory, inputs), rows, inputs.dtype, sizes)
    grid = bitsandbytes_grid(layout.config)
    selector = CodeSelector(
        merged.merger, source, grid, layout.linears, DTYPES[inputs.dtype], moments
    )
    _, written = save_quantized(merged.directory, output_dir, layout, listener.step, selector)
    if not written.quantized:
        raise RunError(f"no linear of the merged {config.model_type} could be quantized.")
    for path in merged.directory.iterdir():
        if ".safetensors" not in path.name and not (output_dir / path.name).exists():
            shutil.move(path, output_dir / path.name)
    shutil.rmtree(merged.directory)
    rounded = replace(
        merged, directory=output_dir, written=replace(merged.written, size_bytes=written.bytes)
    )
    return rounded, selector.sums


def compare_quantized(
    rounded: Candidate,
    checksums: Mapping[str, torch.Tensor],
    inputs: MergeInput,
    eval_set: EvalSet,
    trained: RowLogits,
) -> Agreement:
    """Reload `rounded`, the quantized model; compare its logits on `eval_set` with `trained`.

    Raises RunError if bitsandbytes dequantizes to other weights than the selected ones.
    """
    model = load_merged(rounded.directory, inputs)
    _check_reloaded(model, checksums)
    return compare_logits(trained, eval_set.score(model, inputs.dtype))


def _check_reloaded(model: Any, checksums: Mapping[str, torch.Tensor]) -> None:
    for name, expected in checksums.items():
        weight = dequantized(model.get_submodule(name)).cpu()
        sums = weight @ _signs(weight.shape[1])
        if not (sums - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            raise RunError(
                f"the files are not what was chosen: {name}, reloaded, has different weights. "
                f"Nothing was saved. Please report this with the command."
            )


def _signs(count: int) -> torch.Tensor:
    """Returns `count` fixed random signs, with which a matrix is multiplied for its checksum."""
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
