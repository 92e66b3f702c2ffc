"""Decide which tensors of a model are quantized, and compute the size of the result.

Decisions are made on the meta device by the rule with which transformers replaces linear layers on
loading, so that it can load the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.models.kinds import TASK_CLASSES
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, linear_size
from ftlevel.models.quantization import is_torchao, torchao_bytes
from ftlevel.models.upstream.architectures import model_classes, modules_in_float32
from ftlevel.models.upstream.conversions import Naming
from ftlevel.models.upstream.quantizers import replaced_linears, torchao_linears

BLOCK = 64  # weights per 4-bit scale, as in bitsandbytes
NESTED_BLOCK = 256  # scales per second-level scale, with double quantization
_MAP_BYTES = 16 * 4  # the 16 values of a 4-bit type
_NESTED_MAP_BYTES = 256 * 4
_STATE_BYTES = (78, 168)  # approximate JSON size, without and with double quantization

QUANTIZED = "quantized linears"
PARTS = (QUANTIZED, "other linears", "embeddings", "heads", "experts", "rest")


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model; tied tensors appear once."""

    name: str
    shape: tuple[int, ...]
    part: str
    is_float: bool


@dataclass(frozen=True)
class Layout:
    """Quantization of each tensor of a model.

    `linears` maps quantized modules to whether they are a Conv1D, whose weight is transposed.
    `config` includes the modules to skip. Modules with a name part in `in_float32` stay in float32,
    other floating-point tensors are in `dtype`.
    """

    linears: dict[str, bool]
    config: Any
    dtype: torch.dtype
    in_float32: frozenset[str]
    parameters: dict[str, Parameter]
    naming: Naming

    def part_of(self, name: str) -> str:
        """Return the part of the model's tensor `name`, one of `PARTS`."""
        return self.parameters[name].part if name in self.parameters else "rest"

    def kept_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which an unquantized tensor is written."""
        if not dtype.is_floating_point:
            return dtype
        return torch.float32 if self.in_float32.intersection(name.split(".")) else self.dtype


def build_layout(config: Any, auto_class: str, quantization: Any, dtype: torch.dtype) -> Layout:
    """Return the layout for a model of `config` and transformers class `auto_class`.

    `quantization` is a `BitsAndBytesConfig` or `TorchAoConfig`, of which the layout has a copy with
    the modules to skip. `dtype` is for unquantized tensors.
    """
    meta = build_task_model(config, auto_class)
    naming = Naming(meta)
    tree = ModuleTree(meta)
    kept = _keeping(quantization, find_skipped_modules(config, auto_class))
    linears = _find_quantized(build_task_model(config, auto_class), kept)
    parameters = {p.name: p for p in _parameters(meta, tree, linears)}
    return Layout(linears, kept, dtype, modules_in_float32(meta, dtype), parameters, naming)


def resolve_layout(layout: Layout, keys: Iterable[str]) -> Layout:
    """Return `layout` for a checkpoint with these `keys`.

    A linear layer whose weight is assembled from several stored tensors is not quantized, and its
    name is added to the config.
    """
    named = [layout.naming(key) for key in keys]
    whole = {name for name, pattern in named if pattern is None}
    lost = [name for name in layout.linears if f"{name}.weight" not in whole]
    if not lost:
        return layout
    config = _keeping(layout.config, sorted({*get_skipped_modules(layout.config), *lost}))
    weights = {f"{name}.weight" for name in lost}
    parameters = {
        name: replace(parameter, part="other linears") if name in weights else parameter
        for name, parameter in layout.parameters.items()
    }
    linears = {name: flip for name, flip in layout.linears.items() if name not in set(lost)}
    return replace(layout, config=config, linears=linears, parameters=parameters)


def get_skipped_modules(quantization: Any) -> list[str]:
    """Return the modules that `quantization` skips."""
    named = "modules_to_not_convert" if is_torchao(quantization) else "llm_int8_skip_modules"
    return list(getattr(quantization, named) or ())


def _keeping(quantization: Any, names: list[str]) -> Any:
    """Return a copy of `quantization` that skips `names`."""
    kept = copy.copy(quantization)
    if is_torchao(quantization):
        kept.modules_to_not_convert = names
    else:
        kept.llm_int8_skip_modules = names
    return kept


def find_skipped_modules(config: Any, auto_class: str) -> list[str]:
    """Return the modules to skip: the heads of every task of the architecture, and BERT's pooler.

    Most checkpoints lack a task's head, and transformers would create a quantized layer without
    weights.
    """
    kept: set[str] = set()
    for name in (auto_class, *TASK_CLASSES):
        if type(config) not in model_classes(name):
            continue
        tree = ModuleTree(build_task_model(config, name))
        kept |= set(tree.heads)
        kept |= {
            ".".join(linear.split(".")[-2:])
            for linear, module in tree.modules.items()
            if "pooler" in linear.split(".") and linear_size(module) is not None
        }
    return sorted(kept)


def _find_quantized(meta: Any, quantization: Any) -> dict[str, bool]:
    """Return the linear layers that transformers would replace (`meta` is mutated)."""
    if is_torchao(quantization):
        return dict.fromkeys(torchao_linears(meta, quantization), False)  # none is a Conv1D
    return replaced_linears(meta, quantization, pre_quantized=True)


def _parameters(meta: Any, tree: ModuleTree, linears: dict[str, bool]) -> Iterator[Parameter]:
    experts = {expert.name for expert in tree.experts()}
    saved = meta.state_dict()
    tensors = [*meta.named_parameters(), *meta.named_buffers()]
    for name, tensor in tensors:
        if name not in saved:  # non-persistent buffer
            continue
        owner, _, last = name.rpartition(".")
        module = tree.modules[owner]
        if last == "weight" and owner in linears:
            part = QUANTIZED
        elif name in experts:
            part = "experts"
        elif isinstance(module, torch.nn.Embedding):
            part = "embeddings"
        elif tree.in_heads(owner):
            part = "heads"
        elif last == "weight" and linear_size(module) is not None:
            part = "other linears"
        else:
            part = "rest"
        yield Parameter(name, tuple(tensor.shape), part, tensor.is_floating_point())


def predict_bytes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return part → (bytes before, bytes after), computed from shapes."""
    sizes = {part: [0, 0] for part in PARTS}
    for parameter in layout.parameters.values():
        count = math.prod(parameter.shape)
        source = torch.float32 if not parameter.is_float else layout.dtype
        kept = layout.kept_dtype(parameter.name, source)
        sizes[parameter.part][0] += count * source.itemsize
        sizes[parameter.part][1] += (
            packed_bytes(parameter.shape, layout.config)
            if parameter.part == QUANTIZED
            else count * kept.itemsize
        )
    return {part: (before, after) for part, (before, after) in sizes.items() if before}


def packed_bytes(shape: tuple[int, ...], quantization: Any) -> int:
    """Return the bytes of a quantized weight (out, in), including scales and settings."""
    if is_torchao(quantization):
        return torchao_bytes(shape, quantization)
    count = math.prod(shape)
    if quantization.load_in_8bit:
        return count + 4 * shape[0] + 1
    blocks = math.ceil(count / BLOCK)
    scales, double = 4 * blocks, bool(quantization.bnb_4bit_use_double_quant)
    if double:
        scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + _NESTED_MAP_BYTES
    return math.ceil(count / 2) + scales + _MAP_BYTES + _STATE_BYTES[double]
