"""The codes of a .gguf file's matrices, by what the layers of the run give on its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.evaluation.two_models.on_rows import Probe
from ftlevel.merging.calibration import InputMoments
from ftlevel.merging.low_bits import CodeChooser
from ftlevel.merging.merge_input import MergeInput
from ftlevel.merging.merged_model import TensorMerger
from ftlevel.merging.verify import load_merged
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


def choose_gguf_codes(
    directory: Path, inputs: MergeInput, merger: TensorMerger, rows: Probe, outtype: str
) -> Callable[[str], Codes]:
    """Return what chooses the codes of the merged model's linears.

    The weights of a quantized run lie between the codes of another grid, and those before
    quantization are no better a start, so what is rounded first is the model as trained.

    Args:
        directory: of the merged model.
        inputs: the adapter and its base.
        merger: makes the weights as trained.
        rows: on which the layers' outputs count.
        outtype: a key of `GRIDS`.
    """
    model: Any = load_merged(directory, inputs)
    turned, sizes = {}, {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            turned[name] = type(module).__name__ == "Conv1D"
            sizes[name] = weight.shape[0 if turned[name] else 1]
    moments = InputMoments(model, rows, inputs.dtype, sizes)
    grid, dtype = GRIDS[outtype], DTYPES[inputs.dtype]
    return GgufCodes(CodeChooser(merger, merger, grid, turned, dtype, moments, fits_scales=True))
