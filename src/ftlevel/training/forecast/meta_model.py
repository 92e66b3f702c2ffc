"""The model of a run as it is trained, of any depth, from its config alone: shapes, no numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.config import TrainConfig
from ftlevel.fast.plan.fused_lora import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import build_task_model, keep_heads
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.quantization import build_quantization_config, packs_experts
from ftlevel.models.upstream.experts.which import can_pack
from ftlevel.models.upstream.fake import fake_parameters, pack_fake
from ftlevel.models.upstream.quantizers import quantize_shape
from ftlevel.models.upstream.tensors import own_tensors
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.plan import Plan

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers",
           "decoder_layers")  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers",
              "layers_block_type", "moe_layer_freq", "intermediate_size", "num_attention_heads",
              "num_key_value_heads", "activation_sparsity_pattern")  # fmt: skip
"""Fields of a config that may be lists with an entry per layer."""

_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
"""Fields of a config that list the layers of a kind by their numbers."""


@dataclass(frozen=True)
class FakeModel:
    """A model without numbers.

    Attributes:
        model: with its method and the fast step on it.
        fast: the fast step; None where the step is plain.
        packed: names of the linears whose weights are quantized, under the method's layers.
    """

    model: Any
    fast: FastStep | None
    packed: set[str]


def build_fake_model(
    config: TrainConfig, plan: Plan, layers: Sequence[int] | None = None
) -> FakeModel:
    """Return the model that `plan` trains, on the CPU, without weights.

    Args:
        config: the whole configuration.
        plan: its plan.
        layers: numbers of the layers that each stack has; None for all.
    """
    planned, method = plan.model, METHODS[config.method.kind]
    compute = DTYPES[planned.dtype]
    cut = with_layers(planned.config, layers)
    meta = build_task_model(cut, planned.auto_class)
    meta.to(DTYPES["float32"] if method.build is None else compute)
    meta.tie_weights()
    quantization = build_quantization_config(planned.quant, compute, planned.heads)
    if quantization is not None:
        quantization = keep_heads(quantization, cut, planned.auto_class)
        quantize_shape(meta, quantization)
    base = replace(plan.base, targets=targets_in(meta, plan.base.targets, layers))
    spec = method.start.default(config.method) if method.start else config.method
    model = apply_method(meta, spec, base, fused=uses_fused_layers(config, planned.device))
    _fill_vectors(model)
    # Workers have a share each; one of them is watched, and the others are like it.
    fast = FastStep(model, replace(plan.fast, workers=1)) if plan.fast.enabled else None
    packed = _pack(model, compute, quantization)
    fake_parameters(model)
    model.to = lambda *_, **__: model  # there is nothing to move
    return FakeModel(model, fast, packed)


def targets_in(
    model: torch.nn.Module, targets: Sequence[str], layers: Sequence[int] | None
) -> list[str]:
    """Return the names that `targets` of the whole model have in `model`, which has some layers."""
    tree = ModuleTree(model)
    found = []
    for name in targets:
        stack = next((stack for stack in tree.blocks if name.startswith(f"{stack}.")), None)
        if stack is None or layers is None:
            found.append(name)
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in layers:
            found.append(f"{stack}.{layers.index(int(number))}.{rest}")
    return [name for name in found if name in tree.modules]


def _pack(model: Any, compute: Any, quantization: Any) -> set[str]:
    """Pack what `quantization` says (`model` is mutated), and return its names.

    torch multiplies grouped experts without numbers in bfloat16 alone.
    """
    packed: set[str] = set()
    if quantization is not None:
        experts = quantization if packs_experts(quantization) else None
        packed = pack_fake(model, compute, experts)
    for module in filter(can_pack, model.modules()):
        if any(weight.dtype == torch.float32 for weight in module.parameters()):
            from ftlevel.models.upstream.experts.forward import use_even_shares

            use_even_shares(module.config)
    return packed


def with_layers(config: Any, layers: Sequence[int] | None) -> Any:
    """Return a copy of a model's `config` with some `layers` of each stack; None for all."""
    config = copy.deepcopy(config)  # the fast step writes its attention into it
    if layers is None:
        return config
    text = config.get_text_config()
    for owner in {id(part): part for part in (config, text)}.values():
        for name in _PER_LAYER:
            if isinstance(kinds := getattr(owner, name, None), list | tuple):
                _set(owner, name, [kinds[at] for at in layers if at < len(kinds)])
        for name in _LAYER_NUMBERS:
            if isinstance(numbers := getattr(owner, name, None), list | tuple):
                _set(owner, name, [new for new, old in enumerate(layers) if old in numbers])
        if isinstance(dense := getattr(owner, "first_k_dense_replace", None), int):
            owner.first_k_dense_replace = sum(at < dense for at in layers)
        for name in _DEPTHS:
            if isinstance(getattr(owner, name, None), int):
                _set(owner, name, len(layers))
    return config


def _set(config: Any, name: str, value: Any) -> None:
    """Set a field of `config` (mutated) that is not computed from others."""
    with contextlib.suppress(AttributeError):  # a property, as Jamba's layers_block_type
        setattr(config, name, value)


def _fill_vectors(model: torch.nn.Module) -> None:
    """Give vectors and scalars of `model` numbers (mutated): the fast step tries its norms."""
    made: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        parameters, _ = own_tensors(module)
        for name, tensor in parameters.items():
            if tensor is not None and tensor.dim() < 2:
                if id(tensor) not in made:
                    filled = torch.ones(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        tensor, torch.nn.Parameter(filled, requires_grad=tensor.requires_grad)
                    )  # fmt: skip
                parameters[name] = made[id(tensor)][1]


def describe_blocks(plan: Plan, layers: Sequence[int] | None = None) -> list[list[Any]]:
    """Return for each stack what each block is made of, to see which are alike.

    A block's parameters, its entries in the config, which say where attention differs though the
    weights are alike, and the modules in it that the method adapts.

    Args:
        plan: of the run.
        layers: numbers of the layers that each stack has; None for all.
    """
    config = with_layers(plan.model.config, layers)
    model = build_task_model(config, plan.model.auto_class)
    tree, adapted = ModuleTree(model), set(targets_in(model, plan.base.targets, layers))
    text = config.get_text_config()
    kinds = [getattr(text, name, None) for name in _PER_LAYER]
    return [
        [
            (
                [(name, tuple(p.shape)) for name, p in block.named_parameters()],
                [k[at] for k in kinds if isinstance(k, list | tuple) and at < len(k)],
                [name for name, _ in block.named_modules() if f"{stack}.{at}.{name}" in adapted],
            )
            for at, block in enumerate(tree.modules[stack].children())
        ]
        for stack in tree.blocks
    ]
