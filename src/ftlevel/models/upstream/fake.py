"""Tensors without values on a nominal CPU device, and hooks into tensor operations.

torch's `FakeTensorMode` is ten times slower, as it does checks that only compilers need. These
tensors report the CPU as device, so autocast and SDPA behave as on a CPU; shapes are computed on
the meta device. Operations on ordinary tensors are executed, so masks and labels have values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ftlevel.models.upstream.architectures import NAMES, can_pack

_AT_INDEX = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


_IDENTITIES = (torch.ops.aten.eye.default, torch.ops.aten.eye.m)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to the leaves of nested tuples, lists and dicts; returns a new tree."""
    return tree_map(function, tree)


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
        if func in _OF_SPARSE and (result := _OF_SPARSE[func](*args)) is not None:
            return result
        sources: dict[int, Tensor] = {}

        def enter(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            meta = _inner(value)
            sources[id(meta)] = value
            return meta

        def leave(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            source = sources.get(id(value))  # modified in place: the argument itself
            return FakeTensor(value) if source is None else source

        meta_kwargs = {k: "meta" if k == "device" else v for k, v in (kwargs or {}).items()}
        meta_args, meta_kwargs = tree_map(enter, args), tree_map(enter, meta_kwargs)
        return tree_map(leave, func(*meta_args, **meta_kwargs))


def _new_sparse(_: int, __: int, size: Any, indices: Any, values: Any, *___: Any) -> FakeTensor:
    return _sparse_of(_inner(values), size, indices)


def _sparse_of(values: Tensor, size: Any, indices: Tensor | None) -> FakeTensor:
    sparse = FakeTensor(values.as_strided(size, (0,) * len(size)))
    sparse.sparse_indices = indices
    return sparse


def _masked(dense: FakeTensor, mask: FakeTensor) -> FakeTensor:
    return _sparse_of(
        _inner(dense).new_empty(_inner(mask).untyped_storage().nbytes() // mask.dtype.itemsize),
        mask.size(),
        mask.sparse_indices,
    )


def _values_of(sparse: FakeTensor) -> FakeTensor:
    meta = sparse.shape_only
    count = meta.untyped_storage().nbytes() // meta.dtype.itemsize
    return FakeTensor(meta.as_strided((count,), (1,)))


def _detached(tensor: FakeTensor) -> FakeTensor | None:
    """Returns `tensor` detached if it is sparse (with its indices); else None."""
    indices = getattr(tensor, "sparse_indices", None)
    return None if indices is None else _sparse_of(tensor.shape_only, tensor.size(), indices)


_OF_SPARSE: dict[Any, Callable[..., FakeTensor | None]] = {
    torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default: _new_sparse,
    torch.ops.aten.sparse_mask.default: _masked,
    torch.ops.aten._values.default: _values_of,
    torch.ops.aten.detach.default: _detached,
}
"""Operations on sparse matrices, which SHiRA uses."""


def _inner(value: Tensor) -> Tensor:
    return value.shape_only if isinstance(value, FakeTensor) else _shape_of(value)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def storage_of(tensor: Tensor) -> Any:
    """Returns the storage of `tensor`, which its views share; for a fake one, its meta tensor's."""
    real_tensor = tensor.shape_only if isinstance(tensor, FakeTensor) else tensor
    return real_tensor.untyped_storage()


class Params4bit(FakeTensor):
    """Fake 4-bit weights; named like bitsandbytes' class because PEFT checks the class name."""


class OperationWatch(TorchDispatchMode, ABC):  # type: ignore[no-untyped-call]  # torch's
    """Base class of dispatch modes that observe the results of this thread's tensor operations."""

    @abstractmethod
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


def _as_positions(indices: Any) -> Iterator[Tensor | None]:
    """Yields `indices`, with each boolean mask replaced by the positions where it is True."""
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            yield from index.nonzero(as_tuple=True)
        else:
            yield index


def fake_parameters(model: torch.nn.Module) -> None:
    """Replace parameters and buffers of `model` (modified) by fakes; tied ones stay tied."""
    fakes: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:  # kept alive, so that its id is not reused
                    fakes[id(tensor)] = (tensor, _fake(tensor))
                tensors[name] = fakes[id(tensor)][1]


def _fake(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    fake_tensor = new_fake(tensor.shape, tensor.dtype)
    if not isinstance(tensor, torch.nn.Parameter):
        return fake_tensor
    return torch.nn.Parameter(fake_tensor, requires_grad=tensor.requires_grad)


def new_fake(shape: Any, dtype: torch.dtype) -> Tensor:
    """Returns a fake tensor on the CPU."""
    return FakeTensor(torch.empty(tuple(shape), dtype=dtype, device="meta"))


def pack_fake(model: torch.nn.Module, dtype: torch.dtype, experts: Any = None) -> set[str]:
    """Replace bitsandbytes weights in `model` (modified) by fakes; returns the modules' names."""
    import bitsandbytes as bnb

    packed = set()
    for name, module in list(model.named_modules()):
        if experts is not None and can_pack(module):
            _pack_experts(module, dtype, experts)
        elif isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            state = _fake_state(
                (module.out_features, module.in_features),
                weight.quant_type,
                weight.compress_statistics,
                dtype,
            )
            module._parameters["weight"], module.quant_state = _fake_codes(state), state
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bnb.nn.Linear8bitLt):
            _pack_8bit(module)
        else:
            continue
        packed.add(name)
    return packed


def _fake_state(shape: tuple[int, ...], quant_type: str, double: bool, dtype: torch.dtype) -> Any:
    """Returns a fake `QuantState` with blocks of 64; `double`: the scales are quantized, too."""
    from bitsandbytes.functional import QuantState

    blocks = -(-math.prod(shape) // 64)
    state2 = offset = None
    if double:
        offset = new_fake((), torch.float32)
        scales = new_fake((-(-blocks // 256),), torch.float32)
        code = new_fake((256,), torch.float32)
        state2 = QuantState(scales, code=code, blocksize=256, dtype=torch.float32)
    absmax = new_fake((blocks,), torch.float32 if state2 is None else torch.uint8)
    codes = new_fake((16,), torch.float32)
    return QuantState(absmax, torch.Size(shape), codes, 64, quant_type, dtype, offset, state2)


def _fake_codes(state: Any) -> Any:
    shape = (-(-math.prod(state.shape) // 2), 1)
    weight: Any = Params4bit(torch.empty(shape, dtype=torch.uint8, device="meta"))
    weight.quant_state, weight._is_param = state, True
    return weight


def _pack_experts(module: Any, dtype: torch.dtype, config: Any) -> None:
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization
    from torch.nn.utils.parametrize import register_parametrization

    from ftlevel.models.upstream.experts import assume_even_experts

    for name in NAMES:
        state = _fake_state(
            tuple(module._parameters[name].shape),
            config.bnb_4bit_quant_type,
            config.bnb_4bit_use_double_quant,
            dtype,
        )
        module._parameters[name] = _fake_codes(state)
        register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    assume_even_experts(module.config)


def _pack_8bit(module: Any) -> None:
    shape = (module.out_features, module.in_features)
    weight = torch.nn.Parameter(new_fake(shape, torch.int8), requires_grad=False)
    weight.CB = weight.SCB = None  # type: ignore[attr-defined]
    module._parameters["weight"] = weight
    module.state.CB, module.state.has_fp16_weights = weight.data, False
    module.state.SCB = new_fake(shape[:1], torch.float32)


def packed_tensors(module: Any) -> Iterator[Tensor]:
    """Yields all tensors of a module's fake packed weights."""
    if hasattr(module, "parametrizations"):
        weights = [module.parametrizations[name].original for name in NAMES]
    else:
        weights = [module.weight]
    for weight in weights:
        yield weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            yield module.state.SCB
        while state is not None:
            parts = (state.absmax, state.code, state.offset)
            yield from (part for part in parts if part is not None)
            state = state.state2
