"""Internals of the bitsandbytes quantization of linear layers.

bitsandbytes takes a second to import, so it is imported only if used. With `PackedWeight` each
process quantizes only its own rows: parts aligned to blocks of 64 have the same codes as in the
whole weight. The scales of all blocks are gathered once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ftlevel.models.upstream.architectures import modules_in_float32
from ftlevel.models.upstream.shards import LazyTensor, LazyWeight, rows_of


def check_environment(quantization_config: Mapping[str, Any], device: str) -> None:
    """Raise transformers' error if `device` cannot load weights with this quantization."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(dict(quantization_config), pre_quantized=True)
    quantizer.validate_environment(device_map={"": device}, weights_only=True)


def prepare_quantized(model: Any, quantization: Any, *, pre_quantized: bool) -> Any:
    """Replace layers of `model` (modified) as `from_pretrained` does; returns its `HfQuantizer`."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=pre_quantized)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return quantizer


def replaced_layers(model: Any, quantization: Any, *, pre_quantized: bool) -> dict[str, bool]:
    """Replace layers of `model` (modified) by bitsandbytes'; returns name -> if it was Conv1D."""
    prepare_quantized(model, quantization, pre_quantized=pre_quantized)
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if hasattr(module, "source_cls")
    }


def quantize_shape(model: Any, quantization: Any) -> None:
    """Replace linear layers of the meta `model` (modified) by bitsandbytes' with packed shapes.

    Biases keep their dtype. 4-bit weights become plain parameters, because DoRA copies them, which
    `Params4bit` does not support on the meta device.
    """
    dtypes = {name: bias.dtype for name, bias in model.named_parameters() if name.endswith("bias")}
    quantizer = prepare_quantized(model, quantization, pre_quantized=False)
    quantizer.postprocess_model(model)
    for name, dtype in dtypes.items():
        bias = model.get_parameter(name)
        bias.data = bias.data.to(dtype)
    for module in model.modules():
        quant_type = (
            getattr(module.weight, "quant_type", None) if hasattr(module, "weight") else None
        )
        if quant_type is not None:
            parameter: Any = torch.nn.Parameter(torch.empty_like(module.weight.data), False)
            parameter.quant_type, parameter.compress_statistics = (
                quant_type,
                module.weight.compress_statistics,
            )
            module.weight = parameter
    model.hf_quantizer = quantizer


def keep_trainable_layout(model: torch.nn.Module) -> int:
    """Keep 4-bit layers of `model` (modified) trainable on AVX512-BF16 CPUs; returns how many.

    In eval mode without gradients, `bitsandbytes.nn.Linear4bit` repacks the weight for inference;
    gradients and merging are then silently wrong. Call after every 4-bit load.
    """
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:
        return 0
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Cast unquantized tensors of `model` (modified), except those that are always in float32."""
    float32_names = modules_in_float32(model, dtype)
    packed = sys.modules["bitsandbytes"].nn.Params4bit  # its storage may have a floating dtype
    for name, parameter in model.named_parameters():
        if isinstance(parameter, packed) or not parameter.is_floating_point():
            continue
        if not float32_names & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def four_bit_values(quant_type: str) -> Tensor:
    """Returns the 16 values of nf4 or fp4, ordered by code."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device="cpu")


def scales_of(weight: Any) -> Iterator[Tensor]:
    """Yields the scales of a bitsandbytes weight; if they are quantized, their codes and scales."""
    state = getattr(weight, "quant_state", None)  # 4 bits
    while state is not None:
        yield state.absmax.detach()
        state = state.state2
    scales = getattr(weight, "SCB", None)  # 8 bits
    if scales is not None:
        yield scales.detach()


def supports_4bit_training(linear: Any) -> bool:
    """Returns whether a `Linear4bit` has a compute dtype and is not repacked for inference."""
    state = getattr(linear.weight, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    return state is not None and not packed and bool(linear.compute_type_is_set)


def supports_8bit_training(linear: Any) -> bool:
    """Returns whether a `Linear8bitLt` is on the CPU and computes with dequantized weights."""
    if linear.weight.device.type != "cpu" or linear.state.has_fp16_weights:
        return False
    if linear.weight.CB is not None:
        linear.init_8bit_state()
    return linear.state.CB is not None and linear.state.SCB is not None


def dequantize_8bit(linear: Any, dtype: torch.dtype) -> Tensor:
    """Returns the weight `(out, in)` of a layer that `supports_8bit_training`, in `dtype`."""
    state = linear.state
    return state.CB.to(dtype, copy=True).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))


@contextlib.contextmanager
def with_float_inputs(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, 8-bit layers of `model` (modified) do not round their inputs.

    LLM.int8() rounds inputs to 8 bits, except columns with a large value in any token of the batch,
    so that a row's outputs depend on the other rows.
    """
    bnb = sys.modules.get("bitsandbytes")
    layers = [m for m in model.modules() if bnb is not None and isinstance(m, bnb.nn.Linear8bitLt)]
    for layer in layers:
        layer.forward = functools.partial(_multiply_8bit, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiply_8bit(linear: Any, x: Tensor) -> Tensor:
    """Returns `x` (…, in) times the dequantized weight, as bitsandbytes trains on a CPU."""
    from bitsandbytes.autograd._functions import MatMul8bitFp

    if linear.weight.CB is not None:
        linear.init_8bit_state()
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    product: Tensor = MatMul8bitFp.apply(x, linear.weight, None, bias, linear.state)
    return product


def dequantized(linear: Any) -> Tensor:
    """Returns the float32 weight `(out, in)` of a bitsandbytes layer that has not run yet."""
    import bitsandbytes.functional as bnb

    if (state := getattr(linear.weight, "quant_state", None)) is not None:
        wide = copy.copy(state)
        wide.dtype = torch.float32
        return bnb.dequantize_4bit(linear.weight.data, wide)
    return linear.weight.data.float() * linear.weight.SCB.unsqueeze(1) / 127


def carry_quant_states(module: torch.nn.Module, inside: Sequence[torch.nn.Module]) -> None:
    """Keep quantization states of 4-bit layers in `module` (modified) through FSDP2 sharding.

    FSDP2 gathers plain parameters without scales and class: a forward pre-hook restores both.
    Layers in `inside`, which are sharded separately, are excluded.
    """
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:
        return
    excluded = {part for other in inside for part in other.modules()}
    layers = [
        part
        for part in module.modules()
        if isinstance(part, bnb.nn.Linear4bit) and part not in excluded
    ]
    settings = [vars(linear.weight).copy() for linear in layers]
    for linear in layers:
        if linear.weight.quant_state is not None:  # None if not read yet
            linear.quant_state = linear.weight.quant_state
            linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)

    def restore_states(*_: Any) -> None:
        for linear, attributes in zip(layers, settings, strict=True):
            if linear.quant_state.absmax.device != linear.weight.device:
                linear.quant_state.to(linear.weight.device)
            linear.weight.__class__ = bnb.nn.Params4bit
            linear.weight.__dict__ |= {**attributes, "quant_state": linear.quant_state}

    if layers:
        module.register_forward_pre_hook(restore_states)


_BLOCK = 64  # values per scale; a byte has two codes
_SCALES = 256  # scales per second-level scale


class PackedWeight:
    """A 4-bit weight not loaded yet, of which each process loads and quantizes only its shard.

    `linear` (modified) gets the scales. `transposed`: the weight is stored as `(in, out)` (Conv1D).
    """

    def __init__(self, lazy_weight: LazyWeight, linear: Any, transposed: bool) -> None:
        self._lazy_weight, self._linear, self._transposed = lazy_weight, linear, transposed
        self._shape = torch.Size((linear.out_features, linear.in_features))
        self._quant_type: str = linear.weight.quant_type
        self._scales_packed: bool = linear.weight.compress_statistics

    def part(self, like: DTensor) -> DTensor:
        """Returns the codes sharded like `like`, reading only own rows; a collective operation."""
        import bitsandbytes.functional as bnb

        start, end = rows_of(like)
        count = self._shape.numel()
        first, last = 2 * start // _BLOCK * _BLOCK, min(-(-2 * end // _BLOCK) * _BLOCK, count)
        scales = torch.zeros(-(-count // _BLOCK), device=like.device_mesh.device_type)
        codes = torch.empty(0, 1, dtype=like.dtype, device=scales.device)
        if first < last:
            numbers = self._numbers(first, last).to(scales.device)
            packed, state = bnb.quantize_4bit(
                numbers, blocksize=_BLOCK, quant_type=self._quant_type
            )
            codes = packed.view(-1, 1)[start - first // 2 : end - first // 2].clone()
            absmax = state.absmax
            if not numbers.isfinite().all():  # some kernels' scales do not propagate it
                absmax = torch.full_like(absmax, torch.inf)
            scales[first // _BLOCK : first // _BLOCK + len(absmax)] = absmax
        distributed.all_reduce(scales, distributed.ReduceOp.MAX, like.device_mesh.get_group())
        self._linear.quant_state = self._state(scales)
        return DTensor.from_local(
            codes, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _numbers(self, first: int, last: int) -> Tensor:
        """Returns the values `first` to `last` (exclusive) of the flattened `(out, in)` weight."""
        width = self._shape[1]
        first_row = first // width
        rows = self._lazy_weight.rows(first_row, -(-last // width), transposed=self._transposed)
        return rows.flatten()[first - first_row * width : last - first_row * width]

    def _state(self, scales: Tensor) -> Any:
        import bitsandbytes.functional as bnb

        kwargs = {
            "shape": self._shape,
            "dtype": self._lazy_weight.dtype,
            "blocksize": _BLOCK,
            "code": bnb.get_4bit_type(self._quant_type, device=scales.device),
            "quant_type": self._quant_type,
        }
        if not self._scales_packed:
            return bnb.QuantState(absmax=scales, **kwargs)
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALES)
        return bnb.QuantState(absmax=codes, offset=offset, state2=state, **kwargs)


def pack_lazy(
    model: Any, quantization: Any, lazy_weights: MutableMapping[nn.Parameter, LazyTensor]
) -> None:
    """Replace linear layers of a CPU `model` (modified) by 4-bit ones whose weights load later."""
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
        transposed = issubclass(linear.source_cls, Conv1D)
        kwargs = {
            "quant_type": linear.weight.quant_type,
            "module": linear,
            "compress_statistics": linear.weight.compress_statistics,
        }
        lazy_weight = lazy_weights.get(weight)
        if not isinstance(lazy_weight, LazyWeight):
            full = weight.data.T.contiguous() if transposed else weight.data
            linear.weight = bitsandbytes.nn.Params4bit(full, **kwargs).to(full.device)
            continue
        size = -(-linear.in_features * linear.out_features // 2)
        codes = torch.zeros((), dtype=torch.uint8).expand(size, 1)  # takes no memory
        linear.weight = bitsandbytes.nn.Params4bit(codes, bnb_quantized=True, **kwargs)
        lazy_weights[linear.weight] = PackedWeight(lazy_weight, linear, transposed)
    for weight in {weight for weight, _ in before.values()} - set(model.parameters()):
        lazy_weights.pop(weight, None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
