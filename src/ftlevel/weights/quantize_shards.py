"""Quantize a checkpoint with bitsandbytes, one tensor in memory at a time.

The tensors equal those that `save_pretrained` writes for a model that transformers quantized,
before its first forward pass. `ShardWriter` is for tensors that become known one at a time;
`weights.checkpoint` writes tensors with dtypes and shapes known beforehand.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import read_json, write_json
from ftlevel.errors import InputError, join_names
from ftlevel.models.kinds import TASK_CLASSES, save_legacy_rope
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, get_modules_to_not_convert, linear_size
from ftlevel.models.upstream.architectures import model_classes, modules_in_float32
from ftlevel.models.upstream.conversions import KeyMapper
from ftlevel.models.upstream.quantizers import replaced_layers
from ftlevel.safe_io import open_new
from ftlevel.weights.checkpoint import (
    NAMES,
    TOKENIZER_FILES,
    copy_files,
    load_header,
    save_index,
    weight_files,
)
from ftlevel.weights.codes import QuantizationGrid, four_bit_grid, pack_4bit, quantize_4bit

BLOCK = 64  # weights per 4-bit scale, as in bitsandbytes
NESTED_BLOCK = 256  # scales per second-level scale, with double quantization
_MAP_BYTES = 16 * 4  # the 16 values of a 4-bit type
_NESTED_MAP_BYTES = 256 * 4
_STATE_BYTES = (78, 168)  # approximate JSON size, without and with double quantization

QUANTIZED = "quantized linears"
PARTS = (QUANTIZED, "other linears", "embeddings", "heads", "experts", "rest")


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model; `part` is one of `PARTS`, such as heads. Tied tensors are one."""

    name: str
    shape: tuple[int, ...]
    part: str
    is_float: bool


@dataclass(frozen=True)
class QuantizedLayout:
    """Which tensors of a model are quantized, and how the others are stored.

    `linears` maps quantized modules to whether they are a Conv1D, whose weight is transposed.
    `config` includes the modules to skip. Modules with a name part in `in_float32` stay in float32;
    other floating-point tensors that are not quantized get `dtype`.
    """

    linears: dict[str, bool]
    config: Any
    dtype: torch.dtype
    in_float32: frozenset[str]
    parameters: dict[str, Parameter]
    key_mapper: KeyMapper

    def part_of(self, name: str) -> str:
        """Returns the part of the model (one of `PARTS`) that contains the tensor `name`."""
        return self.parameters[name].part if name in self.parameters else "rest"

    def kept_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the unquantized tensor `name`, of `dtype`, is written."""
        if not dtype.is_floating_point:
            return dtype
        return torch.float32 if self.in_float32.intersection(name.split(".")) else self.dtype


def build_layout(
    config: Any, auto_class: str, quantization: Any, dtype: torch.dtype
) -> QuantizedLayout:
    """Create the layout for a model of `config` and transformers class `auto_class`.

    Its `config` is `quantization` with the modules to skip; `dtype` is for unquantized tensors.
    """
    meta = build_task_model(config, auto_class)
    key_mapper = KeyMapper(meta)
    tree = ModuleTree(meta)
    config_to_skip = _with_modules_to_skip(quantization, get_modules_to_skip(config, auto_class))
    model = build_task_model(config, auto_class)  # modified
    layers = replaced_layers(model, config_to_skip, pre_quantized=True)
    parameters = {p.name: p for p in _parameters(meta, tree, layers)}
    return QuantizedLayout(
        layers, config_to_skip, dtype, modules_in_float32(meta, dtype), parameters, key_mapper
    )


def resolve_layout(layout: QuantizedLayout, keys: Iterable[str]) -> QuantizedLayout:
    """Returns `layout` adapted to a checkpoint with `keys`; InputError if it lacks a weight.

    A linear layer is not quantized if its weight is not exactly one tensor of the checkpoint.
    """
    patterns = dict(map(layout.key_mapper, keys))
    for name, pattern in [*patterns.items()]:
        patterns |= dict.fromkeys(layout.key_mapper.split_names(name, pattern), pattern)
    if missing := [name for name in layout.linears if f"{name}.weight" not in patterns]:
        names = join_names([f"{name}.weight" for name in missing], 3)
        raise InputError(
            f"the checkpoint lacks {len(missing):,} weights of its model: {names}. Is it complete?"
        )
    combined = [name for name in layout.linears if patterns[f"{name}.weight"] is not None]
    if not combined:
        return layout
    config = _with_modules_to_skip(
        layout.config, sorted({*get_skipped_modules(layout.config), *combined})
    )
    weights = {f"{name}.weight" for name in combined}
    parameters = {
        name: replace(parameter, part="other linears") if name in weights else parameter
        for name, parameter in layout.parameters.items()
    }
    layers = {name: flip for name, flip in layout.linears.items() if name not in set(combined)}
    return replace(layout, config=config, linears=layers, parameters=parameters)


def get_skipped_modules(quantization: Any) -> list[str]:
    """Returns the names of modules that the config `quantization` leaves unquantized."""
    return list(quantization.llm_int8_skip_modules or ())


def _with_modules_to_skip(quantization: Any, names: list[str]) -> Any:
    result = copy.copy(quantization)
    result.llm_int8_skip_modules = names
    return result


def get_modules_to_skip(config: Any, auto_class: str) -> list[str]:
    """Returns the names of modules not to quantize, such as heads of any task and BERT's pooler."""
    names: set[str] = set()
    for name in (auto_class, *TASK_CLASSES):
        if type(config) not in model_classes(name):
            continue
        model = build_task_model(config, name)
        tree = ModuleTree(model)
        names |= {*tree.heads, *get_modules_to_not_convert(model)}
        names |= {
            ".".join(linear.split(".")[-2:])
            for linear, module in tree.modules.items()
            if "pooler" in linear.split(".") and linear_size(module) is not None
        }
    return sorted(names)


def _parameters(meta: Any, tree: ModuleTree, linears: dict[str, bool]) -> Iterator[Parameter]:
    experts = {expert.name for expert in tree.experts()}
    state_dict = meta.state_dict()
    for name, tensor in [*meta.named_parameters(), *meta.named_buffers()]:
        if name not in state_dict:  # non-persistent buffer
            continue
        owner, _, last = name.rpartition(".")
        module = tree.modules[owner]
        if last == "weight" and owner in linears:
            group = QUANTIZED
        elif name in experts:
            group = "experts"
        elif isinstance(module, torch.nn.Embedding):
            group = "embeddings"
        elif tree.in_heads(owner):
            group = "heads"
        elif last == "weight" and linear_size(module) is not None:
            group = "other linears"
        else:
            group = "rest"
        yield Parameter(name, tuple(tensor.shape), group, tensor.is_floating_point())


def predict_bytes(layout: QuantizedLayout) -> dict[str, tuple[int, int]]:
    """Returns model part (of `PARTS`) → bytes before and after quantization, from shapes alone."""
    sizes = {part: [0, 0] for part in PARTS}
    for parameter in layout.parameters.values():
        num_values = math.prod(parameter.shape)
        original_dtype = torch.float32 if not parameter.is_float else layout.dtype
        dtype = layout.kept_dtype(parameter.name, original_dtype)
        sizes[parameter.part][0] += num_values * original_dtype.itemsize
        sizes[parameter.part][1] += (
            packed_bytes(parameter.shape, layout.config)
            if parameter.part == QUANTIZED
            else num_values * dtype.itemsize
        )
    return {part: (before, after) for part, (before, after) in sizes.items() if before}


def packed_bytes(shape: tuple[int, ...], quantization: Any) -> int:
    """Returns the bytes of a quantized weight (out, in), including scales and settings."""
    num_values = math.prod(shape)
    if quantization.load_in_8bit:
        return num_values + 4 * shape[0] + 1
    blocks = math.ceil(num_values / BLOCK)
    scales, double = 4 * blocks, bool(quantization.bnb_4bit_use_double_quant)
    if double:
        scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + _NESTED_MAP_BYTES
    return math.ceil(num_values / 2) + scales + _MAP_BYTES + _STATE_BYTES[double]


_ALIGNMENT = 8


class ShardWriter:
    """Writes a .safetensors file in one pass: data first, then the header into space before it.

    `header_bytes` are reserved (`header_bound`); tensors not a multiple of 8 bytes long come last.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self._file = open_new(path, "wb")
        self._reserved = -(-header_bytes // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(8 + self._reserved)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._pending: list[tuple[str, torch.Tensor]] = []
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write `tensor`, on any device and with any strides, under `name`."""
        if tensor.nbytes % _ALIGNMENT:
            self._pending.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        end = self._offset + tensor.nbytes
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end

    def close(self) -> int:
        """Write the remaining tensors and the header; return the file size in bytes."""
        for name, tensor in sorted(self._pending, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._reserved:
            raise ValueError(f"the header takes {len(header)} bytes of {self._reserved} reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._reserved) + header.ljust(self._reserved))
        self._file.close()
        return 8 + self._reserved + self._offset


def header_bound(tensors: Mapping[str, int]) -> int:
    """Returns the maximum header size in bytes; `tensors`: name prefix → number of tensors."""
    # 200 bytes: a suffix, a dtype, a shape of few dimensions and two offsets.
    return 64 + sum(count * (len(json.dumps(name)) + 200) for name, count in tensors.items())


_MORE_FILES = (
    "generation_config.json preprocessor_config.json processor_config.json LICENSE* NOTICE*"
)
COPIED = (*TOKENIZER_FILES, *_MORE_FILES.split())
"""Patterns of the other files of a checkpoint, which are copied."""
_MAX_TENSORS = 7  # a double-quantized weight: packed, scales, their scales, two maps, settings


@dataclass
class QuantizationSizes:
    """Sizes of a checkpoint: total `bytes`, `quantized` tensors, part → [bytes before, after]."""

    parts: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    quantized: int = 0
    bytes: int = 0


SelectCodes = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]
"""Layer name and weight (out, in) → codes and scales of `bitsandbytes_grid`; None for
the nearest codes.
"""


def count_tensors(model_dir: Path) -> int:
    """Returns how many tensors `save_quantized` reads."""
    return sum(len(load_header(shard)[0]) for shard in weight_files(model_dir))


def save_quantized(
    model_dir: Path,
    out: Path,
    layout: QuantizedLayout,
    step: Callable[[int], None],
    get_codes: SelectCodes | None = None,
) -> tuple[QuantizedLayout, QuantizationSizes]:
    """Quantize the model in `model_dir` and save it in `out`; return resolved layout and sizes.

    `get_codes` returns the codes of a weight. Raises InputError if a weight
    to quantize is missing, or a file is corrupted.
    """
    shards = {shard: load_header(shard)[0] for shard in weight_files(model_dir)}
    layout = resolve_layout(layout, [key for entries in shards.values() for key in entries])
    done, sizes = 0, QuantizationSizes()
    weight_map: dict[str, str] = {}
    for shard, entries in shards.items():
        part_of_key = {key: layout.part_of(layout.key_mapper(key)[0]) for key in entries}
        num_tensors = {
            key: _MAX_TENSORS if part == QUANTIZED else 1 for key, part in part_of_key.items()
        }
        file = shard.name if len(shards) > 1 else "model.safetensors"  # may be named as of several
        writer = ShardWriter(out / file, header_bound(num_tensors))
        for key, stored in sorted(entries.items(), key=lambda item: item[1].offset):
            name, part_bytes = layout.key_mapper(key)[0], sizes.parts[part_of_key[key]]
            tensors = _convert(key, name, stored.read(), layout, get_codes)
            for piece, value in tensors.items():
                writer.add(piece, value)
                weight_map[piece] = file
                part_bytes[1] += value.nbytes
            part_bytes[0] += stored.spec.nbytes
            sizes.quantized += part_of_key[key] == QUANTIZED
            done += 1
            step(done)
        sizes.bytes += writer.close()
    if len(shards) > 1:
        save_index(out, weight_map, sum(after for _, after in sizes.parts.values()))
    config = read_json(model_dir / "config.json")
    config["quantization_config"] = layout.config.to_dict()
    config["dtype"] = str(layout.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    write_json(out / "config.json", config)
    save_legacy_rope(out)
    copy_files(model_dir, out, COPIED)
    return layout, sizes


def _convert(
    key: str,
    name: str,
    tensor: torch.Tensor,
    layout: QuantizedLayout,
    get_codes: SelectCodes | None,
) -> dict[str, torch.Tensor]:
    """Returns the tensors to save for `tensor`: `key` in the file, `name` in the model."""
    if layout.part_of(name) != QUANTIZED:
        return {key: tensor.to(layout.kept_dtype(name, tensor.dtype))}
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise InputError(
            f"{key} is stored as {tensor.dtype}: the model is already quantized. Use the "
            f"original model."
        )
    weight = tensor.to(layout.dtype)
    linear = name.removesuffix(".weight")
    if layout.linears[linear]:
        weight = weight.T.contiguous()
    pack = _pack_8bit if layout.config.load_in_8bit else _pack_4bit
    return pack(key, weight, layout.config, get_codes and get_codes(linear, weight))


def bitsandbytes_grid(config: Any) -> QuantizationGrid:
    """Returns the grid of a `BitsAndBytesConfig`; for 8-bit, -127 to 127 with a scale per row."""
    if config.load_in_8bit:
        return QuantizationGrid(torch.arange(-127.0, 128.0) / 127, 0, lambda scales: scales)
    return four_bit_grid(config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)


def _pack_4bit(
    key: str,
    weight: torch.Tensor,
    config: Any,
    codes_and_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    options = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    packed, state = (
        pack_4bit(*codes_and_scales, weight, *options)
        if codes_and_scales
        else quantize_4bit(weight, *options)
    )
    stats = {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {key: packed, **stats}


def _pack_8bit(
    key: str,
    weight: torch.Tensor,
    config: Any,  # noqa: ARG001 - as _pack_4bit
    codes_and_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    if codes_and_scales is None:
        output, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    else:
        codes, scales = codes_and_scales
        output = (codes - 127).to(torch.int8)
    module = key.removesuffix("weight")
    row_major = torch.tensor(0, dtype=torch.uint8)
    return {key: output, f"{module}SCB": scales, f"{module}weight_format": row_major}
