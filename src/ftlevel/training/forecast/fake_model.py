"""The model of a run as it is trained, of any depth, from its config alone: shapes, no numbers."""

from __future__ import annotations

import copy
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
_PER_LAYER = ("layer_types", "mlp_layer_types", "attention_layers")


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


def build_fake_model(config: TrainConfig, plan: Plan, depth: int | None = None) -> FakeModel:
    """Return the model that `plan` trains, on the CPU, without weights.

    Args:
        config: the whole configuration.
        plan: its plan.
        depth: blocks of each stack, the first ones; None for all.
    """
    planned, method = plan.model, METHODS[config.method.kind]
    compute = DTYPES[planned.dtype]
    cut = with_depth(planned.config, depth)
    meta = build_task_model(cut, planned.auto_class)
    meta.to(DTYPES["float32"] if method.build is None else compute)
    meta.tie_weights()
    quantization = build_quantization_config(planned.quant, compute, planned.heads)
    if quantization is not None:
        quantization = keep_heads(quantization, cut, planned.auto_class)
        quantize_shape(meta, quantization)
    there = {name for name, _ in meta.named_modules()}
    base = replace(plan.base, targets=[name for name in plan.base.targets if name in there])
    spec = method.start.default(config.method) if method.start else config.method
    model = apply_method(meta, spec, base, fused=uses_fused_layers(config, planned.device))
    _fill_vectors(model)
    # Workers have a share each; one of them is watched, and the others are like it.
    fast = FastStep(model, replace(plan.fast, workers=1)) if plan.fast.enabled else None
    packed = _pack(model, compute, quantization)
    fake_parameters(model)
    model.to = lambda *_, **__: model  # there is nothing to move
    return FakeModel(model, fast, packed)


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


def with_depth(config: Any, depth: int | None) -> Any:
    """Return a copy of a model's `config` with `depth` blocks in each stack; None for all."""
    config = copy.deepcopy(config)  # the fast step writes its attention into it
    if depth is None:
        return config
    text = config.get_text_config()
    for owner in {id(part): part for part in (config, text)}.values():
        for name in _DEPTHS:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, depth)
        for name in _PER_LAYER:
            if isinstance(kinds := getattr(owner, name, None), list):
                setattr(owner, name, kinds[:depth])
    return config


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


def describe_blocks(model: torch.nn.Module, config: Any) -> list[list[Any]]:
    """Return for each stack of `model` what each block is made of, to see which are alike.

    Args:
        model: on the meta device.
        config: of the model: says where attention differs though the weights are alike.
    """
    tree = ModuleTree(model)
    text = config.get_text_config()
    kinds = [getattr(text, name, None) for name in _PER_LAYER]
    return [
        [
            (
                [(name, tuple(p.shape)) for name, p in block.named_parameters()],
                [kind[at] for kind in kinds if isinstance(kind, list) and at < len(kind)],
            )
            for at, block in enumerate(tree.modules[stack].children())
        ]
        for stack in tree.blocks
    ]
