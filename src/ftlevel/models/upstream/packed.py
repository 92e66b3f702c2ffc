"""Weights in bitsandbytes' 4 bits of which each process reads and quantizes its own rows.

A block of 64 numbers is scaled by its largest, so a part of a weight that begins and ends with a
block has the codes that it has in the whole. The scales of all blocks are what every process needs
to compute with the gathered codes; they are gathered once, before they are quantized themselves.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ftlevel.models.upstream.quantizers import prepare_quantized
from ftlevel.models.upstream.shards import rows_of
from ftlevel.models.upstream.slices import StoredWeight, Unread

_BLOCK = 64  # numbers that share a scale, of which a byte holds two
_SCALES = 256  # scales that share one


class PackedWeight:
    """A weight of a file that will be quantized, and is not read.

    Args:
        stored: in the file, as (out, in).
        linear: of bitsandbytes, which is given the scales (mutated).
        turned: whether the file has it as (in, out), as Conv1D does.
    """

    def __init__(self, stored: StoredWeight, linear: Any, turned: bool) -> None:
        self._stored, self._linear, self._turned = stored, linear, turned
        self._shape = torch.Size((linear.out_features, linear.in_features))
        self._kind: str = linear.weight.quant_type
        self._scales_packed: bool = linear.weight.compress_statistics

    def part(self, like: DTensor) -> DTensor:
        """Return this process's bytes of it, cut as `like` is, which all must ask for together."""
        import bitsandbytes.functional as bnb

        start, end = rows_of(like)
        count = self._shape.numel()
        first, last = 2 * start // _BLOCK * _BLOCK, min(-(-2 * end // _BLOCK) * _BLOCK, count)
        scales = torch.zeros(-(-count // _BLOCK), device=like.device_mesh.device_type)
        own = torch.empty(0, 1, dtype=like.dtype, device=scales.device)
        if first < last:
            numbers = self._numbers(first, last).to(scales.device)
            packed, state = bnb.quantize_4bit(numbers, blocksize=_BLOCK, quant_type=self._kind)
            own = packed.view(-1, 1)[start - first // 2 : end - first // 2].clone()
            found = state.absmax
            if not numbers.isfinite().all():  # not every kernel's scales say so, to all processes
                found = torch.full_like(found, torch.inf)
            scales[first // _BLOCK : first // _BLOCK + len(found)] = found
        distributed.all_reduce(scales, distributed.ReduceOp.MAX, like.device_mesh.get_group())
        self._linear.quant_state = self._state(scales)
        return DTensor.from_local(
            own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _numbers(self, first: int, last: int) -> torch.Tensor:
        """Return the numbers from `first` to before `last`, row by row of (out, in)."""
        width = self._shape[1]
        begin = first // width
        rows = self._stored.rows(begin, -(-last // width), turned=self._turned)
        return rows.flatten()[first - begin * width : last - begin * width]

    def _state(self, scales: torch.Tensor) -> Any:
        """Return what bitsandbytes keeps of a weight that it packed, given all of its `scales`."""
        import bitsandbytes.functional as bnb

        known = {
            "shape": self._shape, "dtype": self._stored.dtype, "blocksize": _BLOCK,
            "code": bnb.get_4bit_type(self._kind, device=scales.device), "quant_type": self._kind,
        }  # fmt: skip
        if not self._scales_packed:
            return bnb.QuantState(absmax=scales, **known)
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALES)
        return bnb.QuantState(absmax=codes, offset=offset, state2=state, **known)


def pack_unread(
    model: Any, quantization: Any, unread: MutableMapping[nn.Parameter, Unread]
) -> None:
    """Give `model` (mutated) the linears that loading it in 4 bits gives, of weights not read yet.

    Args:
        model: in floating point, on the host.
        quantization: a `BitsAndBytesConfig` of 4 bits.
        unread: parameter → the weight that it stands for (mutated).
    """
    import bitsandbytes

    before: dict[str, tuple[Any, Any]] = {
        name: (module.weight, module.bias)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    quantizer = prepare_quantized(model, quantization, pre_quantized=False)
    for name, linear in model.named_modules():
        if not isinstance(linear, bitsandbytes.nn.Linear4bit):
            continue
        weight, linear.bias = before[name]
        turned = issubclass(linear.source_cls, Conv1D)
        settings = {
            "quant_type": linear.weight.quant_type, "module": linear,
            "compress_statistics": linear.weight.compress_statistics,
        }  # fmt: skip
        stored = unread.get(weight)
        if not isinstance(stored, StoredWeight):
            whole = weight.data.T.contiguous() if turned else weight.data
            linear.weight = bitsandbytes.nn.Params4bit(whole, **settings).to(whole.device)
            continue
        size = -(-linear.in_features * linear.out_features // 2)
        codes = torch.zeros((), dtype=torch.uint8).expand(size, 1)  # no memory; no scale, either
        linear.weight = bitsandbytes.nn.Params4bit(codes, bnb_quantized=True, **settings)
        unread[linear.weight] = PackedWeight(stored, linear, turned)
    for weight in {weight for weight, _ in before.values()} - set(model.parameters()):
        unread.pop(weight, None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
