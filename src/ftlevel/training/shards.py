"""Share a model out over the processes of a run, and read what each of them holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import distributed
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
from ftlevel.models.upstream.shards import Slices, whole

_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class Shared:
    """Modules that are gathered together.

    Attributes:
        modules: which are called in every pass, the first before the others.
        inside: modules in them that are gathered by themselves.
        gathers_again: whether that is done for the backward pass as well.
        precision: in which they are gathered, and their gradients added up.
    """

    modules: list[torch.nn.Module]
    inside: Sequence[torch.nn.Module]
    gathers_again: bool
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


def shard(
    model: Any, device: str, *, holds: bool, dtype: torch.dtype, slices: Slices | None = None
) -> None:
    """Leave this process its part of `model` (mutated), on its device.

    What a method adds and trains stays whole in every process; of `--method full`, where the
    model's own weights are trained, everything is shared out. Dropped parts are freed block by
    block, so that a device holds its part and one block at most.

    Args:
        model: with its method, in the host's memory or on the device.
        device: torch device type.
        holds: whether a block that was gathered for the forward pass is held until its backward
            pass (ZeRO-2), and not gathered again (ZeRO-3).
        dtype: compute precision.
        slices: what is not read yet, of which this process reads its part; None where all is.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    own = kept_whole(model)
    for parameter in own:
        parameter.data = parameter.data.to(mesh.device_type)
    blocks = blocks_of(model)
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    shared = list[Shared]()
    for block in blocks:
        linears = cast_linears(block, dtype, own)
        if linears:
            shared.append(Shared(linears, (), not holds, narrow))
        shared.append(Shared([block], linears, not holds))
    # Embeddings, head and last norm are those of the model itself: gathered once a pass.
    for part in [*shared, Shared([model], blocks, False)]:
        for module in part.modules:
            carry_quant_states(module, part.inside)
        read = slices.put_aside(part.modules, keep=own) if slices is not None else None
        fully_shard(part.modules, mesh=mesh, reshard_after_forward=part.gathers_again,
                    mp_policy=part.precision, ignored_params=own)  # fmt: skip
        if read is not None:
            read()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(mesh.device_type)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    _reshard_after_inference(model)


def _reshard_after_inference(model: Any) -> None:
    """Have `model` (mutated) reshard its parameters after a forward pass without gradients.

    FSDP2 leaves that to the backward pass for modules that it does not reshard after the forward
    pass. Without a backward pass they would stay unsharded until one process alone reads the state
    dict, which reshards there; the next forward pass would then be gathered by the others without
    it. Text is generated with the parameters unsharded from its first token to its last.
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


def cast_linears(
    block: torch.nn.Module, dtype: torch.dtype, own: set[torch.nn.Parameter]
) -> list[Any]:
    """Return the linears of `block` whose trained weights, none of `own`, are wider than `dtype`.

    Autocast would cast what was gathered of each, and keep that for the backward pass: the whole
    model in 16 bits in every process. So they are gathered in `dtype`, half the bytes, and given
    back. Norms and embeddings, which it leaves alone, stay as wide as they are.
    """
    return [
        part
        for part in block.modules()
        if isinstance(part, torch.nn.Linear | Conv1D)
        and part.weight.requires_grad
        and part.weight not in own
        and part.weight.dtype.itemsize > dtype.itemsize
    ]


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
