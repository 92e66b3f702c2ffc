"""Which tensors of a model are quantized, which are kept, and how many bytes that makes.

Decided on the meta device, by the rule with which transformers replaces linears when it loads, so
that what is written is what will be read.
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

BLOCK = 64  # weights that share a 4-bit scale, as bitsandbytes has it
NESTED_BLOCK = 256  # scales that share a scale of their own, with double quantization
_MAP_BYTES = 16 * 4  # the 16 values of a 4-bit type
_NESTED_MAP_BYTES = 256 * 4
_STATE_BYTES = (78, 168)  # JSON of the settings without and with double quantization, about

QUANTIZED = "quantized linears"
PARTS = (QUANTIZED, "other linears", "embeddings", "heads", "experts", "rest")


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model that a checkpoint holds; a tied one stands once."""

    name: str
    shape: tuple[int, ...]
    part: str
    is_float: bool


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor.

    Attributes:
        linears: name of a quantized module → whether it is a Conv1D, whose weight is transposed.
        config: the `BitsAndBytesConfig` or `TorchAoConfig` for config.json, with what is kept.
        dtype: of the floating-point tensors that are kept.
        in_float32: modules that stay in float32, by the last part of their name.
        parameters: every tensor of the model by name.
        naming: how a checkpoint's names become the model's.
    """

    linears: dict[str, bool]
    config: Any
    dtype: torch.dtype
    in_float32: frozenset[str]
    parameters: dict[str, Parameter]
    naming: Naming

    def part_of(self, name: str) -> str:
        """Return the part of the tensor that the model calls `name`."""
        return self.parameters[name].part if name in self.parameters else "rest"

    def kept_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which a tensor that is not quantized is written."""
        if not dtype.is_floating_point:
            return dtype
        return torch.float32 if self.in_float32.intersection(name.split(".")) else self.dtype


def build_layout(config: Any, auto_class: str, quantization: Any, dtype: torch.dtype) -> Layout:
    """Decide what is quantized.

    Args:
        config: the model's config.
        auto_class: transformers' class of the checkpoint.
        quantization: a `BitsAndBytesConfig` or `TorchAoConfig`; the result has a copy that names
            the modules to keep.
        dtype: of what is kept.
    """
    meta = build_task_model(config, auto_class)
    naming = Naming(meta)
    tree = ModuleTree(meta)
    kept = _keeping(quantization, find_kept_modules(config, auto_class))
    linears = _find_quantized(build_task_model(config, auto_class), kept)
    parameters = {p.name: p for p in _parameters(meta, tree, linears)}
    return Layout(linears, kept, dtype, modules_in_float32(meta, dtype), parameters, naming)


def resolve_layout(layout: Layout, keys: Iterable[str]) -> Layout:
    """Return `layout` for a checkpoint with these `keys`.

    A linear whose weight is assembled from several tensors while loading cannot be packed piece by
    piece; it is kept, and config.json says so.
    """
    named = [layout.naming(key) for key in keys]
    whole = {name for name, pattern in named if pattern is None}
    lost = [name for name in layout.linears if f"{name}.weight" not in whole]
    if not lost:
        return layout
    config = _keeping(layout.config, sorted({*kept_modules(layout.config), *lost}))
    weights = {f"{name}.weight" for name in lost}
    parameters = {
        name: replace(parameter, part="other linears") if name in weights else parameter
        for name, parameter in layout.parameters.items()
    }
    linears = {name: flip for name, flip in layout.linears.items() if name not in set(lost)}
    return replace(layout, config=config, linears=linears, parameters=parameters)


def kept_modules(quantization: Any) -> list[str]:
    """Return the modules that `quantization` names as left alone."""
    named = "modules_to_not_convert" if is_torchao(quantization) else "llm_int8_skip_modules"
    return list(getattr(quantization, named) or ())


def _keeping(quantization: Any, names: list[str]) -> Any:
    """Return a copy of `quantization` that leaves `names` alone."""
    kept = copy.copy(quantization)
    if is_torchao(quantization):
        kept.modules_to_not_convert = names
    else:
        kept.llm_int8_skip_modules = names
    return kept


def find_kept_modules(config: Any, auto_class: str) -> list[str]:
    """Return what no quantization may touch: the heads of every task of the architecture.

    A task's head is new on most checkpoints; left to itself transformers would make it a 4-bit
    layer without weights. BERT's pooler belongs to its classification head.
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
    """Return the linears that transformers would replace (`meta` is mutated)."""
    if is_torchao(quantization):
        return dict.fromkeys(torchao_linears(meta, quantization), False)  # none is a Conv1D
    return replaced_linears(meta, quantization, pre_quantized=True)


def _parameters(meta: Any, tree: ModuleTree, linears: dict[str, bool]) -> Iterator[Parameter]:
    experts = {expert.name for expert in tree.experts()}
    saved = meta.state_dict()
    tensors = [*meta.named_parameters(), *meta.named_buffers()]
    for name, tensor in tensors:
        if name not in saved:  # a buffer that is computed anew
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
    """Return part → (bytes before, bytes after), from shapes alone.

    Before: every floating-point tensor in the type in which the rest is kept.
    """
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
    """Return the bytes of a weight `(out, in)` once quantized, its scales and settings included."""
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
