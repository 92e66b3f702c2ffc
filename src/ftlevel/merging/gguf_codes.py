"""The codes of a .gguf file's matrices, by what the layers of the run give on its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ftlevel.evaluation.two_models.on_rows import Probe
from ftlevel.merging.calibration import InputMoments
from ftlevel.merging.low_bits import CodeChooser, Weights
from ftlevel.models.hardware import DTYPES
from ftlevel.weights.gguf.blocks import GRIDS, Codes


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
