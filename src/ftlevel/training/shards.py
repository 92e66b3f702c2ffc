"""Shard a model across processes with FSDP2, and gather its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.head.likelihoods import base_model
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.upstream.quantizers import carry_quant_states
from ftlevel.models.upstream.shards import UnreadWeights, whole

_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class FsdpUnit:
    """Modules that form one FSDP2 unit.

    Attributes:
        inside: submodules that are units of their own.
        gathers_again: whether parameters are gathered again for the backward pass.
        precision: dtypes of gathered parameters and of gradient reduction.
    """

    modules: list[torch.nn.Module]
    inside: Sequence[torch.nn.Module]
    gathers_again: bool
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


def shard(
    model: Any, device: str, *, holds: bool, dtype: torch.dtype, slices: UnreadWeights | None = None
) -> None:
    """Shard `model` (mutated) across processes, with this process's part on its device.

    Tensors that a method adds and trains stay whole in every process; `--method full` shards
    everything. Parts are freed block by block, so a device stores its part and at most one block.
    With `holds`, gathered blocks are stored until backward (ZeRO-2), else gathered again (ZeRO-3).
    `slices` are weights to be read here in part; None if all are loaded.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    replicated = replicated_parameters(model)
    for parameter in replicated:
        parameter.data = parameter.data.to(mesh.device_type)
    blocks = blocks_of(model)
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    shared = list[FsdpUnit]()
    for block in blocks:
        linears = cast_linears(block, dtype, replicated)
        if linears:
            shared.append(FsdpUnit(linears, (), not holds, narrow))
        shared.append(FsdpUnit([block], linears, not holds))
    # Embeddings, head and final norm belong to the root unit, gathered once per pass.
    for part in [*shared, FsdpUnit([model], blocks, False)]:
        for module in part.modules:
            carry_quant_states(module, part.inside)
        read = slices.put_aside(part.modules, keep=replicated) if slices is not None else None
        fully_shard(
            part.modules,
            mesh=mesh,
            reshard_after_forward=part.gathers_again,
            mp_policy=part.precision,
            ignored_params=replicated,
        )
        if read is not None:
            read()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device_type)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    _reshard_after_inference(model)


def _reshard_after_inference(model: Any) -> None:
    """Make `model` (mutated) reshard its parameters after a forward pass without gradients.

    FSDP2 leaves modules with `reshard_after_forward=False` unsharded until backward. Without a
    backward pass, a process that reads the state dict alone would reshard, and the next forward
    pass would not match the other processes'. Generation keeps parameters unsharded until its last
    token.
    """
    generate, is_generating = getattr(model, "generate", None), False

    def reshard(*_: Any) -> None:
        if is_generating or torch.is_grad_enabled():
            return
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def generate_and_reshard(*arguments: Any, **options: Any) -> Any:
        nonlocal is_generating
        is_generating = True
        try:
            return cast("Any", generate)(*arguments, **options)
        finally:
            is_generating = False
            reshard()

    model.register_forward_hook(reshard)
    if generate is not None:
        model.generate = generate_and_reshard


def replicated_parameters(model: Any) -> set[torch.nn.Parameter]:
    """Return the parameters that every process has whole: adapters, frozen norms and biases.

    Norms and biases are a ten-thousandth of a model, and the fast step reads them without their
    modules.
    """
    small = {p for p in model.parameters() if not p.requires_grad and p.dim() < _MATRIX}
    return small if base_model(model) is model else small | set(trainable_parameters(model))


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Return the transformer blocks of `model`, of encoder and decoder."""
    tree = ModuleTree(base_model(model))
    return [block for stack in tree.blocks for block in tree.modules[stack].children()]


def cast_linears(
    block: torch.nn.Module, dtype: torch.dtype, replicated: set[torch.nn.Parameter]
) -> list[Any]:
    """Return the linear layers of `block` with sharded trainable weights wider than `dtype`.

    Autocast would store a cast copy of each until backward, a full 16-bit model per process. They
    are gathered in `dtype` instead. Norms and embeddings, which autocast skips, are unchanged.
    """
    return [
        part
        for part in block.modules()
        if isinstance(part, torch.nn.Linear | Conv1D)
        and part.weight.requires_grad
        and part.weight not in replicated
        and part.weight.dtype.itemsize > dtype.itemsize
    ]


def is_sharded(model: Any) -> bool:
    """Whether `model` is sharded with FSDP2."""
    return isinstance(model, FSDPModule)


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the trainable parameters of `model`."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gather(model: Any, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the sharded `model` by name, whole and on the CPU.

    All processes must iterate together; those without `keep` only take part in gathering.
    """
    seen: dict[int, Tensor] = {}  # preserves tied tensors
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if keep else gathered[:0]
        if keep:
            yield name, seen[id(tensor)]
