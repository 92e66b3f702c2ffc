"""Write a .gguf file: metadata keys, then the tensors, with one in memory at a time.

    q8_0   x ≈ d · q,  q = -127 … 127,  d = max |x| / 127
    q5_0   x ≈ d · q,  q = -16 … 15,    d = -(the x that is farthest from 0) / 16
    q4_0   x ≈ d · q,  q = -8 … 7,      d = -(the x that is farthest from 0) / 8

Each block of 32 values in a row has a scale d in float16, signed in q5_0 and q4_0 so that the
largest value is exact (ggml-quants.c: quantize_row_q8_0_ref, quantize_row_q5_0_ref,
quantize_row_q4_0_ref). Vectors, norms, learned positions and rotary divisors stay in float32.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.quants import quantize

from ftlevel.errors import InputError, RunError, join_names
from ftlevel.extras.serving.gguf_families import FAMILIES, convert, extra_tensors
from ftlevel.weights.checkpoint import Checkpoint
from ftlevel.weights.codes import QuantizationGrid

BLOCK = 32


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.half().float()


@dataclass(frozen=True)
class _SignedGrid(QuantizationGrid):
    """A grid with an asymmetric range; signed scales put the largest weight on the longer side."""

    def scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the scale of each block: the largest |weight| gets the value farthest from 0."""
        blocks = self._blocks(weight)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return extreme / self.values[self.values.abs().argmax()]


GRIDS: dict[str, QuantizationGrid] = {
    "q8_0": QuantizationGrid(torch.arange(-127.0, 128.0), BLOCK, _half),
    "q5_0": _SignedGrid(torch.arange(-16.0, 16.0), BLOCK, _half),
    "q4_0": _SignedGrid(torch.arange(-8.0, 8.0), BLOCK, _half),
}
SELECTED_TYPES = ("q5_0", "q4_0")
"""Types with chosen codes; rounding to q8_0 loses almost nothing."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix as codes (rows, columns), uint8 indices of the grid, and scales (rows, blocks)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def value(self, outtype: str) -> torch.Tensor:
        """Returns the dequantized matrix in float32."""
        grid = GRIDS[outtype]
        return grid.value(self.codes.long(), grid.stored(self.scales.reshape(-1)))

    def pack(self, outtype: str) -> Any:
        """Returns the bytes in the layout of `outtype`: a uint8 array (rows, bytes per row)."""
        rows = len(self.codes)
        d = self.scales.reshape(rows, -1, 1).half().view(torch.uint8)
        blocks = self.codes.reshape(rows, -1, BLOCK)
        if outtype == "q8_0":
            q = (blocks.int() - 127).to(torch.int8).view(torch.uint8)
            return torch.cat([d, q], -1).reshape(rows, -1).numpy()
        # The first half of a block has the low four bits of a byte, the second half the high four.
        low, high = blocks[..., : BLOCK // 2] & 15, blocks[..., BLOCK // 2 :] & 15
        chunks = [d, low | (high << 4)]
        if outtype == "q5_0":  # the fifth bits, eight per byte, lowest first
            high_bits = (blocks >> 4).view(*blocks.shape[:2], -1, 8)
            weights = 2 ** torch.arange(8, dtype=torch.uint8)
            chunks.insert(1, (high_bits * weights).sum(-1, dtype=torch.uint8))
        return torch.cat(chunks, -1).reshape(rows, -1).numpy()


def round_to_blocks(weight: torch.Tensor, outtype: str) -> torch.Tensor:
    """Returns `weight` rounded to `outtype` in float32, computed as in ggml: x · (1 / d)."""
    grid = GRIDS[outtype]
    scales = grid.scales_of(weight)
    inverse = torch.where(scales == 0, 0.0, 1 / scales).unsqueeze(-1)
    blocks = weight.reshape(-1, BLOCK)
    if outtype == "q8_0":
        levels = blocks * inverse
        rounded = levels.sign() * (levels.abs() + 0.5).floor()
    else:
        zero = len(grid.values) // 2
        rounded = (blocks * inverse + zero + 0.5).trunc().clamp(0, 2 * zero - 1) - zero
    return (rounded * grid.stored(scales).unsqueeze(-1)).reshape(weight.shape)


OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

OUTTYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written to a .gguf file.

    `source` is the model's name of the tensor, if any; `shape` is as in torch, reversed in the
    file. `read` returns the tensor in the file's layout. `codes` returns selected codes in the
    model's row order, which `arrange` reorders for the file; without `codes`, weights are rounded.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    outtype: str
    transposed: bool
    read: Callable[[], torch.Tensor]
    codes: Callable[[], QuantizedMatrix] | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] = torch.clone

    @property
    def nbytes(self) -> int:
        """Size in the file in bytes, without padding."""
        per_block, size = GGML_QUANT_SIZES[OUTTYPES[self.outtype][0]]
        return math.prod(self.shape) // per_block * size


def get_outtype(checkpoint: Checkpoint) -> str:
    """Returns the outtype, such as `f16`, that keeps the dtype of the input embedding."""
    name = next(
        name
        for name, parameter in checkpoint.model.named_parameters()
        if parameter is checkpoint.model.get_input_embeddings().weight
    )
    return OUTTYPE_OF_DTYPE.get(checkpoint.spec(name).dtype, "f32")


def plan_tensors(
    checkpoint: Checkpoint,
    config: Any,
    outtype: str,
    get_codes: Callable[[str], QuantizedMatrix] | None = None,
    unused: Sequence[str] = (),
) -> list[GGUFTensor]:
    """Returns the tensors of the file in order, without loading them.

    `get_codes` maps the name of a weight to its codes (out, in); if None, weights are rounded.
    Modules in `unused` are left out. Raises InputError if llama.cpp has no name for a tensor, or
    the checkpoint lacks one.
    """
    names = name_map(config)
    planned, unsupported, missing = [], [], []
    for source in dict.fromkeys(name for name, _ in checkpoint.model.named_parameters()):
        if source in checkpoint.ties or source.startswith(tuple(f"{name}." for name in unused)):
            continue
        if not checkpoint.has_tensor(source):
            missing.append(source)
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            unsupported.append(source)
            continue
        tensor = _plan(checkpoint, config, source, name, outtype)
        tensor = replace(tensor, arrange=partial(convert, config, name, is_conv1d=False))
        if get_codes is not None and tensor.outtype == outtype:
            tensor = replace(tensor, codes=partial(get_codes, source))
        planned.append(tensor)
    if unsupported:
        raise InputError(
            f"{join_names(unsupported, 3)}: llama.cpp's {FAMILIES[config.model_type].architecture}"
            " has no place for it. The model would not be the same without it."
        )
    if missing:
        raise InputError(f"the checkpoint lacks {join_names(missing, 3)}. Is it complete?")
    planned += [
        GGUFTensor(name, None, tuple(value.shape), "f32", False, value.clone)
        for name, value in extra_tensors(config).items()
    ]
    return planned


def _plan(checkpoint: Checkpoint, config: Any, source: str, name: str, outtype: str) -> GGUFTensor:
    module = checkpoint.model.get_submodule(source.rpartition(".")[0])
    transposed = type(module).__name__ == "Conv1D" and source.endswith(".weight")
    shape = checkpoint.spec(source).shape
    shape = shape[::-1] if transposed else shape
    if (
        len(shape) == 1
        or name.startswith(("position_embd", "token_types", "rope_"))
        or "_norm" in name
    ):
        outtype = "f32"
    elif outtype in GRIDS and shape[-1] % BLOCK:
        outtype = "f16"
    elif outtype in SELECTED_TYPES and name.startswith(("token_embd", "output.")):
        outtype = "q8_0"  # like llama.cpp: an error here affects every token

    def read() -> torch.Tensor:
        return convert(config, name, checkpoint.read(source), is_conv1d=transposed)

    return GGUFTensor(name, source, shape, outtype, transposed, read)


def name_map(config: Any) -> Any:
    """Returns gguf's map from tensor names of the model to names in the file."""
    architecture = FAMILIES[config.model_type].architecture
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, config.num_hidden_layers)


def save_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[GGUFTensor],
    step: Callable[[int], None],
) -> None:
    """Save a .gguf file; `step` gets the number of tensors written.

    Raises RunError if a value is too large for float16, and OSError if the disk is full.
    """
    writer = GGUFWriter(path, metadata["general.architecture"])
    try:
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for tensor in tensors:
            _add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(_pack(tensor))
            step(done)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is None:  # NumPy wrote only a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        writer.close()


def file_keys(outtype: str) -> dict[str, Any]:
    """Returns the metadata keys for `outtype`, the type of most tensors in the file."""
    keys: dict[str, Any] = {"general.file_type": int(OUTTYPES[outtype][1])}
    if outtype in GRIDS:
        keys["general.quantization_version"] = _QUANTIZATION_VERSION
    return keys


def round_to(tensor: torch.Tensor, outtype: str) -> torch.Tensor:
    """Returns `tensor` rounded to `outtype`, computed without gguf so that it can verify a file."""
    tensor = tensor.float()
    if outtype == "f32":
        return tensor
    if outtype in GRIDS:
        return round_to_blocks(tensor, outtype)
    return tensor.to(torch.float16 if outtype == "f16" else torch.bfloat16).float()


def iterate_rounded_weights(tensors: Sequence[GGUFTensor], model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the name and values of each weight of `model`, rounded as in the file's `tensors`."""
    parameters = dict(model.named_parameters())
    for tensor in tensors:
        if tensor.source is None or tensor.outtype == "f32":
            continue
        weight = parameters[tensor.source].detach()
        # Interleaving moves whole rows, so blocks stay the same.
        if tensor.codes is not None:
            rounded = tensor.codes().value(tensor.outtype)
        else:
            rounded = round_to(weight.T if tensor.transposed else weight, tensor.outtype)
        yield tensor.source, rounded.T if tensor.transposed else rounded


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor_info(writer: GGUFWriter, tensor: GGUFTensor) -> None:
    type_ = OUTTYPES[tensor.outtype][0]
    if tensor.outtype in ("f32", "f16"):
        dtype = np.dtype(np.float32 if tensor.outtype == "f32" else np.float16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes)
        return
    per_block, size = GGML_QUANT_SIZES[type_]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // per_block * size)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=type_)


def _pack(tensor: GGUFTensor) -> Any:
    if tensor.codes is not None:
        matrix = tensor.codes()
        arranged = (tensor.arrange(part) for part in (matrix.codes, matrix.scales))
        return QuantizedMatrix(*arranged).pack(tensor.outtype)
    value = tensor.read().detach()
    if tensor.outtype == "f32":
        return value.float().contiguous().numpy()
    if tensor.outtype == "bf16":
        return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if tensor.outtype == "f16":
        half = value.to(torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise RunError(
                f"{tensor.source} has values above float16's maximum of 65,504. Nothing was "
                f"written. Use --outtype bf16 or f32."
            )
        return half.numpy()
    return quantize(value.float().contiguous().numpy(), OUTTYPES[tensor.outtype][0])
