"""Share a model out over the processes of a run, and read what each of them holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from ftlevel.fast.head.loss import base_model
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.upstream.quantizers import carry_quant_states
from ftlevel.models.upstream.shards import whole
from ftlevel.models.upstream.slices import Slices

_MATRIX = 2  # dimensions


def shard(model: Any, device: str, *, holds: bool, slices: Slices | None = None) -> None:
    """Leave this process its part of `model` (mutated), on its device.

    What a method adds and trains stays whole in every process; of `--method full`, where the
    model's own weights are trained, everything is shared out. Dropped parts are freed block by
    block, so that a device holds its part and one block at most.

    Args:
        model: with its method, in the host's memory or on the device.
        device: torch device type.
        holds: whether a block that was gathered for the forward pass is held until its backward
            pass (ZeRO-2), and not gathered again (ZeRO-3).
        slices: what is not read yet, of which this process reads its part; None where all is.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    own = kept_whole(model)
    for parameter in own:
        parameter.data = parameter.data.to(mesh.device_type)
    blocks = blocks_of(model)
    # Embeddings, head and last norm are those of the model itself: gathered once a pass.
    for part, inside, gathers in [*((b, (), not holds) for b in blocks), (model, blocks, False)]:
        carry_quant_states(part, inside)
        read = slices.put_aside(part, keep=own) if slices is not None else None
        fully_shard(part, mesh=mesh, reshard_after_forward=gathers, ignored_params=own)
        if read is not None:
            read()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device_type)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def kept_whole(model: Any) -> set[torch.nn.Parameter]:
    """Return what every process has all of: what a method trains, and frozen norms and biases.

    These are a ten-thousandth of a model, and the fast step's norms read them past their modules.
    """
    small = {p for p in model.parameters() if not p.requires_grad and p.dim() < _MATRIX}
    return small if base_model(model) is model else small | set(trained(model))


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """Return the blocks of `model`, of an encoder and of a decoder."""
    tree = ModuleTree(base_model(model))
    return [block for stack in tree.blocks for block in tree.modules[stack].children()]


def is_sharded(model: Any) -> bool:
    """Whether each process has a part of `model`."""
    return isinstance(model, FSDPModule)


def trained(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of `model` that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gather(model: Any, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every tensor of `model` by name, whole and in the host's memory, one at a time.

    Args:
        model: sharded; all processes must go through it together.
        keep: whether this process is given them; the others take part in the gathering alone.
    """
    seen: dict[int, torch.Tensor] = {}  # tensors that are tied stay so
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            all_of_it = whole(tensor.detach())
            seen[id(tensor)] = all_of_it.cpu() if keep else all_of_it[:0]
        if keep:
            yield name, seen[id(tensor)]
