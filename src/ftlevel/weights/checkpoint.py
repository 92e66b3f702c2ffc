"""Read and write safetensors files one tensor at a time, under the model's parameter names.

Format (safetensors README): eight bytes with the header's length, a JSON header with dtype, shape
and offsets of every tensor, and the data. Writing needs memory for one `TensorPart`;
`safetensors.torch.save_file` needs all tensors. A checkpoint may use other names (prefixes, older
versions) and split tensors (experts of a mixture). The conversions in both directions are those of
transformers. Tensors are read on demand; the model stays on the meta device.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ftlevel.artifacts.checkpoints import detect_corruption
from ftlevel.artifacts.files import Workspace, load_safetensors_header, read_json, write_json
from ftlevel.errors import InputError
from ftlevel.models.loading import build_task_model, load_model, rename_prefix
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream import conversions
from ftlevel.models.upstream.architectures import tied_names
from ftlevel.safe_io import open_new

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """Returns a meta tensor of this dtype and shape."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def get_tensor_info(tensor: torch.Tensor) -> TensorSpec:
    """Returns dtype and shape of `tensor`."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose bytes begin at `offset` in the safetensors file `path`."""

    path: Path
    spec: TensorSpec
    offset: int

    def read(self) -> torch.Tensor:
        """Load the tensor into newly allocated memory."""
        if self.spec.nbytes == 0:
            return torch.empty(self.spec.shape, dtype=self.spec.dtype)
        tensor = torch.empty(self.spec.nbytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(tensor.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise InputError(f"{self.path} ends before its header says. Is it incomplete?")
                view = view[count:]
        return tensor.view(self.spec.dtype).view(self.spec.shape)

    def copy_to(self, out: IO[bytes]) -> None:
        """Append the tensor's bytes to `out`."""
        remaining = self.spec.nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while remaining:
                block = file.read(min(_BLOCK, remaining))
                if not block:
                    raise InputError(f"{self.path} ends before its header says. Is it incomplete?")
                out.write(block)
                remaining -= len(block)


def load_header(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Returns a safetensors file's tensors by name, and the metadata; InputError if invalid."""
    start, header = load_safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: {name} is of type {entry['dtype']}, which is not a plain number. "
                f"Expected one of {', '.join(DTYPES)}."
            )
        info = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        tensors[name] = FileTensor(path, info, start + entry["data_offsets"][0])
    return tensors, metadata


@dataclass(frozen=True)
class TensorPart:
    """Tensors that are written to a file together, in this order.

    `source` is a file's tensor to copy, or a function that returns the tensors by name.
    """

    specs: Mapping[str, TensorSpec]
    source: FileTensor | Callable[[], Mapping[str, torch.Tensor]]


def write_file(
    path: Path, parts: Sequence[TensorPart], on_part: Callable[[], None] = lambda: None
) -> None:
    """Write `parts` as one safetensors file and flush it to disk; call `on_part` after each."""
    specs = [(name, spec) for part in parts for name, spec in part.specs.items()]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs:
        end = start + spec.nbytes
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open_new(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            _append_part(file, part)
            on_part()
        file.flush()
        os.fsync(file.fileno())


def _append_part(file: IO[bytes], part: TensorPart) -> None:
    if isinstance(part.source, FileTensor):
        part.source.copy_to(file)
        return
    tensors = part.source()
    for name, spec in part.specs.items():
        tensor = tensors[name].detach().cpu().contiguous()
        if get_tensor_info(tensor) != spec:
            raise ValueError(f"{name} is {get_tensor_info(tensor)} and was announced as {spec}")
        if spec.nbytes:
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def write_files(
    output_dir: Path,
    shards: Mapping[str, Sequence[TensorPart]],
    on_part: Callable[[], None] = lambda: None,
) -> int:
    """Save shards (file name → parts), with an index if several; return the size in bytes."""
    total, weight_map = 0, {}
    for name, parts in shards.items():
        write_file(output_dir / name, parts, on_part)
        for part in parts:
            weight_map.update(dict.fromkeys(part.specs, name))
            total += sum(spec.nbytes for spec in part.specs.values())
    if len(shards) > 1:
        save_index(output_dir, weight_map, total)
    return total


def save_index(output_dir: Path, weight_map: Mapping[str, str], size: int) -> None:
    """Save the index of several shards: tensor → file, and the total size in bytes."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(output_dir / "model.safetensors.index.json", index)


def weight_files(model_dir: Path) -> list[Path]:
    """Returns the files that transformers loads, sorted; InputError if one is missing."""
    single = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{model_dir} has no model.safetensors and no index of shards.")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({error}). Is the copy incomplete?") from None
    paths = [model_dir / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{model_dir} lacks {missing[0]}, which its index names.")
    return paths


TOKENIZER_FILES = tuple(
    """
    tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model
    chat_template* additional_chat_templates/*
    """.split()
)
"""Patterns of tokenizer files, with transformers' names."""


def copy_files(source_dir: Path, output_dir: Path, patterns: Sequence[str]) -> None:
    """Copy the files in `source_dir` that match `patterns`; links are followed."""
    for path in {path for pattern in patterns for path in source_dir.glob(pattern)}:
        if path.is_file():
            target = output_dir / path.relative_to(source_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a checkpoint that form one tensor of the model, or several, such as fused QKV.

    `keys` are in the order in which transformers reads them; `patterns` has the pattern of
    `converter` that each key matches. Without a converter, the only tensor is used unchanged.
    `names` has the model's tensors if there are several.
    """

    keys: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class Checkpoint:
    """Weights of a model on disk, each loaded when it is read.

    Attributes:
        stored: checkpoint name → tensor; in memory for a .gguf file.
        groups: model name → checkpoint names.
        model: the model on the meta device.
        ties: name of a tied tensor that is not in the checkpoint → name of the tensor that is.
        unused: checkpoint names that the model does not use.
    """

    stored: Mapping[str, FileTensor | torch.Tensor]
    groups: dict[str, TensorGroup]
    model: Any
    ties: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def has_tensor(self, name: str) -> bool:
        """Returns whether the checkpoint has the model's tensor `name`."""
        return self.ties.get(name, name) in self.groups

    def names_with(self, name: str) -> list[str]:
        """Returns the model's tensors that are stored together with `name`, including `name`."""
        return (self.groups[name].names if name in self.groups else []) or [name]

    def read(self, name: str) -> torch.Tensor:
        """Load a copy of the model's tensor `name` in the checkpoint's dtype."""
        group = self._group(name)
        return self._convert(name, group, {key: self._tensor(key) for key in group.keys})

    def spec(self, name: str) -> TensorSpec:
        """Returns dtype and shape of the model's tensor `name` without loading it."""
        group = self._group(name)
        specs = {key: self._tensor_info(key).meta() for key in group.keys}
        return get_tensor_info(self._convert(name, group, specs))

    def plain(self, name: str) -> FileTensor | None:
        """Returns the stored tensor if the model uses it unconverted from a file; else None."""
        group = self._group(name)
        tensor = self.stored[group.keys[0]]
        return tensor if group.converter is None and isinstance(tensor, FileTensor) else None

    def file(self, name: str) -> str | None:
        """Returns the name of the file that has (the first part of) `name`; None if in memory."""
        tensor = self.stored[self._group(name).keys[0]]
        return tensor.path.name if isinstance(tensor, FileTensor) else None

    def _group(self, name: str) -> TensorGroup:
        group = self.groups.get(self.ties.get(name, name))
        if group is None:
            raise InputError(
                f"the weights have no {name}, which the model needs. Is a copy incomplete, or is "
                "its config.json of another model?"
            )
        return group

    def _tensor(self, key: str) -> torch.Tensor:
        tensor = self.stored[key]
        return tensor.read() if isinstance(tensor, FileTensor) else tensor.clone()

    def _tensor_info(self, key: str) -> TensorSpec:
        tensor = self.stored[key]
        return tensor.spec if isinstance(tensor, FileTensor) else get_tensor_info(tensor)

    def _convert(
        self, name: str, group: TensorGroup, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if group.converter is None:
            return tensors[group.keys[0]]
        parts = zip(group.keys, group.patterns, map(tensors.__getitem__, group.keys), strict=True)
        first = group.names[0] if group.names else name
        return conversions.convert(group.converter, first, parts, self.model)[name]


def open_checkpoint(source: ModelSource, model: Any, key_mapping: Mapping[str, str]) -> Checkpoint:
    """Open the weights of `source` (downloaded if needed) for `model`, a model on the meta device.

    Conversions are recorded on `model` (modified) as by `from_pretrained`; `key_mapping` is that of
    `rename_prefix`. Raises InputError if weight files are missing or corrupted.
    """
    tensors: dict[str, FileTensor | torch.Tensor] = {}
    for path in weight_files(get_local_dir(source)):
        tensors.update(load_header(path)[0])
    key_mapper = conversions.KeyMapper(model, key_mapping)
    groups, unused = _group_tensors(tensors, key_mapper)
    key_mapper.record_conversions()
    checkpoint = Checkpoint(tensors, groups, model, unused=unused)
    _record_ties(checkpoint)
    return checkpoint


def open_base(source: ModelSource, config: Any, auto_class: str, model: Any = None) -> Checkpoint:
    """Open the weights of a base; those of a .gguf file are loaded into memory in float32.

    `model` is a meta model to use in place of that of `config`, such as one with more tokens.
    """
    model = build_task_model(config, auto_class) if model is None else model
    if source.kind != "gguf":
        return open_checkpoint(source, model, rename_prefix(config, auto_class))
    loaded, _ = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
    return checkpoint_in_memory(model, loaded)


def checkpoint_in_memory(model: Any, module: Any) -> Checkpoint:
    """Returns the weights of the loaded model `module` as a `Checkpoint`, without copying them.

    `model` (modified) is the same model on the meta device.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    conversions.forget_conversions(model)
    ties = tied_names(model)
    shared = {name for name in ties if state[name].data_ptr() == state[ties[name]].data_ptr()}
    groups = {name: TensorGroup([name]) for name in state if name not in shared}
    checkpoint = Checkpoint(state, groups, model)
    _record_ties(checkpoint)
    return checkpoint


def get_local_dir(source: ModelSource) -> Path:
    """Returns the local directory of `source`; a Hub model is downloaded if needed."""
    if source.path is not None:
        return source.path
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.location,
            revision=source.revision,
            local_files_only=source.local_files_only,
            allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES],
        )
    )


def _group_tensors(
    keys: Mapping[str, Any], key_mapper: conversions.KeyMapper
) -> tuple[dict[str, TensorGroup], list[str]]:
    """Returns model name → its checkpoint tensors, as in transformers, and the unused names."""
    groups: dict[str, TensorGroup] = {}
    unused = []
    for key in conversions.in_reading_order(keys):
        name, pattern = key_mapper(key)
        if name not in key_mapper.names:
            unused.append(key)
        elif pattern is None:
            groups[name] = TensorGroup([key])
        else:
            names = key_mapper.split_names(name, pattern)
            converter = key_mapper.converters[pattern]
            group = groups.setdefault(name, TensorGroup([], converter, names=names))
            group.keys.append(key)
            group.patterns.append(pattern)
            groups |= dict.fromkeys(names, group)
    return groups, unused


def _record_ties(checkpoint: Checkpoint) -> None:
    ties = tied_names(checkpoint.model)
    for target, source in ties.items():
        if target in checkpoint.groups and source not in checkpoint.groups:
            target, source = source, target
        if target not in checkpoint.groups and source in checkpoint.groups:
            checkpoint.ties[target] = source
    for target, source in ties.items():
        if target not in checkpoint.groups and source in checkpoint.ties:
            checkpoint.ties.setdefault(target, checkpoint.ties[source])


_PARTS = "shard-*.safetensors"
"""Shards that the processes of a sharded run write."""


def merge_sharded_checkpoint(checkpoint_dir: Path) -> Path:
    """Returns `checkpoint_dir`, or a temporary copy with merged shards; InputError if corrupted."""
    times = [path.stat().st_mtime_ns for path in checkpoint_dir.glob(_PARTS)]
    if not times:
        return checkpoint_dir
    return Path(_merge_shards_once(checkpoint_dir.resolve(), max(times)).name)


@functools.cache
def _merge_shards_once(checkpoint_dir: Path, _time: int) -> Workspace:
    from ftlevel.models.upstream.shards import merge_shards  # imports torch.distributed

    corruption = detect_corruption(checkpoint_dir)
    if corruption is not None:
        raise InputError(
            f"{checkpoint_dir} cannot be assembled: {corruption}. Use another checkpoint."
        )
    workspace = Workspace("checkpoint")
    merge_shards(checkpoint_dir, Path(workspace.name))
    for path in checkpoint_dir.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, Path(workspace.name) / path.name)
    return workspace
