"""Tensors without values on a nominal CPU device, and hooks into tensor operations.

torch's `FakeTensorMode` is ten times slower, as it does checks that only compilers need. These
tensors report the CPU as device, so autocast and SDPA behave as on a CPU; shapes are computed on
the meta device. Operations on ordinary tensors are executed, so masks and labels have values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ftlevel.models.upstream.architectures import NAMES, can_pack


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to the leaves of nested tuples, lists and dicts; returns a new tree."""
    return tree_map(function, tree)


_MATRIX = 2  # dimensions


class FakeTensor(Tensor):
    """Tensor without values that reports device CPU; `shape_only` is an equal meta tensor."""

    shape_only: Tensor
    sparse_indices: Tensor | None = None

    @staticmethod
    def __new__(cls, shape_only: Tensor) -> FakeTensor:
        """Create a fake tensor like the meta tensor `shape_only`."""
        fake_tensor: FakeTensor = Tensor._make_wrapper_subclass(
            cls,
            shape_only.size(),
            strides=shape_only.stride(),
            dtype=shape_only.dtype,
            storage_offset=shape_only.storage_offset(),
            device=torch.device("cpu"),
        )
        fake_tensor.shape_only = shape_only
        return fake_tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's
        return f"FakeTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares what it is without one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Returns fake results of `func`; shapes are computed on meta tensors."""
        if func in _SPARSE:
            result = FakeTensor(_SPARSE[func](*tree_map(_as_meta, args)))
            if func is _NEW_SPARSE:
                result.sparse_indices = args[3]
            elif func is not _VALUES:
                result.sparse_indices = getattr(args[-1], "sparse_indices", None)
            return result
        sources: dict[int, Tensor] = {}

        def enter(value: Any) -> Any:
            meta = _as_meta(value)
            sources[id(meta)] = value
            return meta

        def leave(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            source = sources.get(id(value))  # modified in place: the argument itself
            return FakeTensor(value) if source is None else source

        meta_kwargs = {k: "meta" if k == "device" else v for k, v in (kwargs or {}).items()}
        meta_args, meta_kwargs = tree_map(enter, (args, meta_kwargs))
        return tree_map(leave, func(*meta_args, **meta_kwargs))


def _as_meta(value: Any) -> Any:
    if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
        return getattr(value, "shape_only", value)
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _num_stored(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.dtype.itemsize


def _as_sparse(values: Tensor, size: Any) -> Tensor:
    return values.as_strided(size, (0,) * len(size))


_NEW_SPARSE = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default
_VALUES = torch.ops.aten._values.default
_SPARSE: dict[Any, Callable[..., Tensor]] = {
    _NEW_SPARSE: lambda _, __, size, ___, values, *____: _as_sparse(values, size),
    _VALUES: lambda tensor: tensor.as_strided((_num_stored(tensor),), (1,)),
    torch.ops.aten.sparse_mask.default: (
        lambda dense, mask: _as_sparse(dense.new_empty(_num_stored(mask)), mask.size())
    ),
    torch.ops.aten.detach.default: Tensor.detach,
}
"""Operations on sparse matrices, which SHiRA uses: meta tensors that store only the values."""


def storage_of(tensor: Tensor) -> Any:
    """Returns the storage of `tensor`, which its views share; for a fake one, its meta tensor's."""
    real_tensor = tensor.shape_only if isinstance(tensor, FakeTensor) else tensor
    return real_tensor.untyped_storage()


class Params4bit(FakeTensor):
    """Fake 4-bit weights; named like bitsandbytes' class because PEFT checks the class name."""


class OperationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Base class of dispatch modes that observe the results of this thread's tensor operations."""

    def on_result(self, tensor: Tensor) -> None:
        """Observe a result of an operation: a new tensor, a view, or a modified tensor."""

    def on_cast(self, tensor: Tensor, result: Tensor) -> None:
        """Observe that `result` is `tensor` in another dtype; called before `on_result`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _AT_INDEX:
            args = (args[0], list(_as_positions(args[1])), *args[2:])
        if func in _IDENTITIES:  # DoRA's identity matrix; its values are not read
            result: Any = new_fake((args * 2)[:2], (kwargs or {}).get("dtype") or torch.float32)
        else:
            result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.on_cast(args[0], result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.on_result(leaf)
        return result


_AT_INDEX = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
_IDENTITIES = (torch.ops.aten.eye.default, torch.ops.aten.eye.m)


def _as_positions(indices: Any) -> Iterator[Tensor | None]:
    """Yields `indices`, with each boolean mask replaced by the positions where it is True."""
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        yield from index.nonzero(as_tuple=True) if is_mask else (index,)


def fill_vectors(model: torch.nn.Module) -> None:
    """Replace biases and norms of a meta `model` (modified) by ones; the fast step reads them."""
    vectors: dict[Any, Any] = {}  # tied ones stay tied
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.dim() < _MATRIX:
                ones = torch.ones(tensor.shape, dtype=tensor.dtype)
                vector = torch.nn.Parameter(ones, tensor.requires_grad)
                module._parameters[name] = vectors.setdefault(tensor, vector)


def fake_parameters(model: torch.nn.Module) -> None:
    """Replace parameters and buffers of `model` (modified) by fakes; tied ones stay tied."""
    fakes: dict[Any, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    tensors[name] = fakes.setdefault(tensor, _fake(tensor))


def _fake(tensor: Tensor) -> Tensor:
    fake_tensor = new_fake(tensor.shape, tensor.dtype)
    if not isinstance(tensor, torch.nn.Parameter):
        return fake_tensor
    return torch.nn.Parameter(fake_tensor, requires_grad=tensor.requires_grad)


def new_fake(shape: Any, dtype: torch.dtype) -> Tensor:
    """Returns a fake tensor on the CPU."""
    return FakeTensor(torch.empty(tuple(shape), dtype=dtype, device="meta"))


def pack_fake(model: torch.nn.Module, dtype: torch.dtype, experts: Any = None) -> list[Tensor]:
    """Replace bitsandbytes weights in `model` (modified) by fakes; returns all their tensors.

    `experts` is the quantization config if experts are quantized, too.
    """
    import bitsandbytes as bnb

    tensors: list[Tensor] = []
    for module in list(model.modules()):
        if experts is not None and can_pack(module):
            tensors += _pack_experts(module, dtype, experts)
        elif isinstance(module, bnb.nn.Linear4bit):
            args = module.weight.quant_type, module.weight.compress_statistics
            shape = module.out_features, module.in_features
            weight, packed = _quantize(shape, dtype, *args)
            module._parameters["weight"], module.quant_state = weight, weight.quant_state
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False
            tensors += packed
        elif isinstance(module, bnb.nn.Linear8bitLt):
            tensors += _pack_8bit(module)
    return tensors


def _quantize(
    shape: Sequence[int], dtype: torch.dtype, quant_type: str, double: bool
) -> tuple[Any, list[Tensor]]:
    """Returns fake 4-bit weights and all their tensors; `double`: the scales are quantized, too."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        new_fake(shape, dtype), compress_statistics=double, quant_type=quant_type
    )
    weight: Any = Params4bit(codes.shape_only)
    weight.quant_state, weight._is_param = state, True
    states = [state] if state.state2 is None else [state, state.state2]
    tensors = (value for each in states for value in vars(each).values())
    return weight, [weight, *(value for value in tensors if isinstance(value, Tensor))]


def _pack_experts(module: Any, dtype: torch.dtype, config: Any) -> list[Tensor]:
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization
    from torch.nn.utils.parametrize import register_parametrization

    from ftlevel.models.upstream.experts import assume_even_experts

    tensors: list[Tensor] = []
    for name in NAMES:
        shape = module._parameters[name].shape
        args = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
        module._parameters[name], packed = _quantize(shape, dtype, *args)
        state = module._parameters[name].quant_state
        register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
        tensors += packed
    assume_even_experts(module.config)
    return tensors


def _pack_8bit(module: Any) -> list[Tensor]:
    shape = (module.out_features, module.in_features)
    weight = torch.nn.Parameter(new_fake(shape, torch.int8), requires_grad=False)
    weight.CB = weight.SCB = None  # type: ignore[attr-defined]
    module._parameters["weight"] = weight
    module.state.CB, module.state.has_fp16_weights = weight.data, False
    module.state.SCB = new_fake(shape[:1], torch.float32)
    return [weight, module.state.SCB]
