"""Read the weights of a checkpoint under the model's parameter names, and convert them back.

A checkpoint may use other names (prefixes, older versions) and split tensors (experts of a
mixture). The conversions are those of transformers. Tensors are read on demand; the model stays on
the meta device.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.errors import InputError
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream import conversions
from ftlevel.models.upstream.architectures import tied_names
from ftlevel.weights.tensor_files import (
    StoredTensor,
    TensorSpec,
    read_header,
    spec_of,
    weight_files,
)
from ftlevel.workspace import Workspace

TOKENIZER_FILES = tuple(
    """
    tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model
    chat_template* additional_chat_templates/*
    """.split()
)
"""Patterns of tokenizer files, with transformers' names."""


@dataclass(frozen=True)
class TensorGroup:
    """Stored tensors that form one tensor of the model.

    `keys` are in transformers' reading order, each with its pattern of `converter` in `patterns`.
    Without a converter, a single tensor is used unchanged.
    """

    keys: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


@dataclass
class Checkpoint:
    """Weights of a model, read on demand.

    Attributes:
        stored: checkpoint name → tensor; in memory for a .gguf file.
        groups: model name → stored tensors.
        model: the model on the meta device.
        ties: model name → name of the tensor that it shares, if only that one is stored.
        unused: checkpoint names that the model does not use.
    """

    stored: Mapping[str, StoredTensor | torch.Tensor]
    groups: dict[str, TensorGroup]
    model: Any
    ties: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def holds(self, name: str) -> bool:
        """Return whether the model's tensor `name` can be read."""
        return self.ties.get(name, name) in self.groups

    def read(self, name: str) -> torch.Tensor:
        """Read a copy of the model's tensor `name` in its stored precision."""
        group = self._group(name)
        return self._convert(name, group, {key: self._tensor(key) for key in group.keys})

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of the model's tensor `name` without reading it."""
        group = self._group(name)
        specs = {key: self._spec(key).meta() for key in group.keys}
        return spec_of(self._convert(name, group, specs))

    def plain(self, name: str) -> StoredTensor | None:
        """Return the stored tensor of `name` if it is used unchanged, else None."""
        group = self._group(name)
        tensor = self.stored[group.keys[0]]
        return tensor if group.converter is None and isinstance(tensor, StoredTensor) else None

    def file(self, name: str) -> str | None:
        """Return the name of the file with the first stored tensor of `name`; None in memory."""
        tensor = self.stored[self._group(name).keys[0]]
        return tensor.path.name if isinstance(tensor, StoredTensor) else None

    def _group(self, name: str) -> TensorGroup:
        """Return the stored tensors of `name`, or raise InputError if there are none."""
        group = self.groups.get(self.ties.get(name, name))
        if group is None:
            raise InputError(
                f"the weights have no {name}, which the model needs. Is a copy incomplete, or is "
                "its config.json of another model?"
            )
        return group

    def _tensor(self, key: str) -> torch.Tensor:
        tensor = self.stored[key]
        return tensor.read() if isinstance(tensor, StoredTensor) else tensor.clone()

    def _spec(self, key: str) -> TensorSpec:
        tensor = self.stored[key]
        return tensor.spec if isinstance(tensor, StoredTensor) else spec_of(tensor)

    def _convert(
        self, name: str, group: TensorGroup, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if group.converter is None:
            return tensors[group.keys[0]]
        parts = zip(group.keys, group.patterns, map(tensors.__getitem__, group.keys), strict=True)
        return conversions.convert(group.converter, name, parts, self.model)


def open_checkpoint(source: ModelSource, model: Any, key_mapping: Mapping[str, str]) -> Checkpoint:
    """Open the weights of `source` for `model`, which is on the meta device.

    A Hub model is downloaded if needed. The conversions are recorded on `model` (mutated) as by
    `from_pretrained`; `key_mapping` comes from `rename_prefix`.

    Raises:
        InputError: weight files are missing or damaged.
    """
    stored: dict[str, StoredTensor | torch.Tensor] = {}
    for path in weight_files(local_directory(source)):
        stored.update(read_header(path)[0])
    naming = conversions.Naming(model, key_mapping)
    groups, unused = _translate(stored, naming)
    naming.tell_model()
    checkpoint = Checkpoint(stored, groups, model, unused=unused)
    _tie(checkpoint)
    return checkpoint


def checkpoint_in_memory(model: Any, loaded: Any) -> Checkpoint:
    """Return the weights of the model `loaded`, e.g. from a .gguf file, without copying them.

    `model` is the same class on the meta device; its recorded conversions are removed (mutated).
    """
    state = {name: tensor.detach() for name, tensor in loaded.state_dict().items()}
    conversions.forget_conversions(model)
    ties = tied_names(model)
    shared = {name for name in ties if state[name].data_ptr() == state[ties[name]].data_ptr()}
    groups = {name: TensorGroup([name]) for name in state if name not in shared}
    checkpoint = Checkpoint(state, groups, model)
    _tie(checkpoint)
    return checkpoint


def local_directory(source: ModelSource) -> Path:
    """Return the local directory of `source`; a Hub model is downloaded if needed."""
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


def convert_for_saving(model: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `save_pretrained` writes for the tensor `name`; several for a fused mixture."""
    return conversions.revert(model, {name: tensor})


def _translate(
    stored: Mapping[str, Any], naming: conversions.Naming
) -> tuple[dict[str, TensorGroup], list[str]]:
    """Group stored names by the model's names, as transformers does when it loads."""
    groups: dict[str, TensorGroup] = {}
    unused = []
    for key in conversions.in_reading_order(stored):
        name, pattern = naming(key)
        if name not in naming.names:
            unused.append(key)
        elif pattern is None:
            groups[name] = TensorGroup([key])
        else:
            group = groups.setdefault(name, TensorGroup([], naming.converters[pattern]))
            group.keys.append(key)
            group.patterns.append(pattern)
    return groups, unused


def _tie(checkpoint: Checkpoint) -> None:
    """Record tied tensors of which the checkpoint stores one (mutated)."""
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


def merge_sharded_checkpoint(directory: Path) -> Path:
    """Return `directory`, or a temporary directory with the model merged from its shards.

    The temporary directory exists until the process ends. Raises InputError if a shard is missing
    or damaged.
    """
    if not any(directory.glob(_PARTS)):
        return directory
    return Path(_together(directory.resolve()).name)


@functools.cache
def _together(directory: Path) -> Workspace:
    from ftlevel.models.upstream.shards import merge_shards  # imports torch.distributed

    damage = find_damage(directory)
    if damage is not None:
        raise InputError(f"{directory} cannot be assembled: {damage}. Use another checkpoint.")
    workspace = Workspace("checkpoint")
    merge_shards(directory, Path(workspace.name))
    for path in directory.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, Path(workspace.name) / path.name)
    return workspace
