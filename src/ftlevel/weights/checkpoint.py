"""The weights of a model on disk, under the names that its class gives them, and back again.

A checkpoint may call a tensor otherwise than the model does (a prefix of another class, names of an
older version), and hold in several what the model holds in one (the experts of a mixture).
transformers translates while it loads and while it saves; this room asks it for both translations
and reads a tensor when it is wanted, so that the model itself is never in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.errors import InputError
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream import conversions
from ftlevel.models.upstream.architectures import tied_names
from ftlevel.weights.tensor_files import Spec, Stored, read_header, spec_of, weight_files

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""Files that a tokenizer consists of, by the names that transformers gives them."""


@dataclass(frozen=True)
class Group:
    """Stored tensors that become one tensor of the model.

    Attributes:
        keys: their names in the checkpoint, in the order in which transformers reads them.
        converter: how they become it; None where it is a single one and stays as it is.
        patterns: for each key, the pattern of `converter` that it matched.
    """

    keys: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)


@dataclass
class Checkpoint:
    """A model's weights, read when they are asked for.

    Attributes:
        stored: name in the checkpoint → tensor; in memory for a .gguf file.
        groups: name in the model → what it is made of.
        model: the model on the meta device.
        ties: name in the model → name whose tensor it shares, where the checkpoint has only that.
        unused: names in the checkpoint that the model has no use for.
    """

    stored: Mapping[str, Stored | torch.Tensor]
    groups: dict[str, Group]
    model: Any
    ties: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def holds(self, name: str) -> bool:
        """Whether the model's tensor `name` can be read."""
        return self.ties.get(name, name) in self.groups

    def read(self, name: str) -> torch.Tensor:
        """Return the model's tensor `name`, in memory of its own and as precise as it is stored."""
        group = self._group(name)
        return self._convert(name, group, {key: self._tensor(key) for key in group.keys})

    def spec(self, name: str) -> Spec:
        """Return what `read` would give, without reading it."""
        group = self._group(name)
        specs = {key: self._spec(key).meta() for key in group.keys}
        return spec_of(self._convert(name, group, specs))

    def plain(self, name: str) -> Stored | None:
        """Return the stored tensor that is the model's tensor `name` as it is, if there is one."""
        group = self._group(name)
        found = self.stored[group.keys[0]]
        return found if group.converter is None and isinstance(found, Stored) else None

    def file(self, name: str) -> str | None:
        """Return the name of the file that the model's tensor `name` begins in; None in memory."""
        found = self.stored[self._group(name).keys[0]]
        return found.path.name if isinstance(found, Stored) else None

    def _group(self, name: str) -> Group:
        """Return what the model's tensor `name` is made of.

        Raises:
            InputError: it is not there.
        """
        group = self.groups.get(self.ties.get(name, name))
        if group is None:
            raise InputError(
                f"the weights have no {name}, which the model needs. Was a copy cut short, or is "
                "its config.json of another model?"
            )
        return group

    def _tensor(self, key: str) -> torch.Tensor:
        found = self.stored[key]
        return found.read() if isinstance(found, Stored) else found.clone()

    def _spec(self, key: str) -> Spec:
        found = self.stored[key]
        return found.spec if isinstance(found, Stored) else spec_of(found)

    def _convert(
        self, name: str, group: Group, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if group.converter is None:
            return tensors[group.keys[0]]
        parts = zip(group.keys, group.patterns, map(tensors.__getitem__, group.keys), strict=True)
        return conversions.convert(group.converter, name, parts, self.model)


def open_checkpoint(source: ModelSource, model: Any, key_mapping: Mapping[str, str]) -> Checkpoint:
    """Return the weights of `source` for `model`, which is on the meta device.

    Args:
        source: a directory, a built-in model, or a Hub model that is fetched if it must be.
        model: the model's class on the meta device; it is told which names were translated, as
            `from_pretrained` tells it (mutated).
        key_mapping: as `rename_prefix` gives it.

    Raises:
        InputError: its files are missing or damaged.
    """
    stored: dict[str, Stored | torch.Tensor] = {}
    for path in weight_files(local_directory(source)):
        stored.update(read_header(path)[0])
    naming = conversions.Naming(model, key_mapping)
    groups, unused = _translate(stored, naming)
    naming.tell_model()
    checkpoint = Checkpoint(stored, groups, model, unused=unused)
    _tie(checkpoint)
    return checkpoint


def checkpoint_in_memory(model: Any, loaded: Any) -> Checkpoint:
    """Return the weights of a model that is `loaded` already, as from a .gguf file.

    Args:
        model: its class on the meta device.
        loaded: the model; the tensors stay its own.
    """
    state = {name: tensor.detach() for name, tensor in loaded.state_dict().items()}
    conversions.forget_conversions(model)
    ties = tied_names(model)
    shared = {name for name in ties if state[name].data_ptr() == state[ties[name]].data_ptr()}
    groups = {name: Group([name]) for name in state if name not in shared}
    checkpoint = Checkpoint(state, groups, model)
    _tie(checkpoint)
    return checkpoint


def local_directory(source: ModelSource) -> Path:
    """Return the directory on this disk that has the weights of `source`.

    A Hub model is fetched into the cache where it is not there.
    """
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


def as_saved(model: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `save_pretrained` writes for the model's tensor `name`.

    It is the tensor itself where names and shapes agree, and several for one of a fused mixture.
    """
    return conversions.revert(model, {name: tensor})


def _translate(
    stored: Mapping[str, Any], naming: conversions.Naming
) -> tuple[dict[str, Group], list[str]]:
    """Group stored names by the model's names, as transformers does when it loads."""
    groups: dict[str, Group] = {}
    unused = []
    for key in conversions.in_reading_order(stored):
        name, pattern = naming(key)
        if name not in naming.names:
            unused.append(key)
        elif pattern is None:
            groups[name] = Group([key])
        else:
            group = groups.setdefault(name, Group([], naming.converters[pattern]))
            group.keys.append(key)
            group.patterns.append(pattern)
    return groups, unused


def _tie(checkpoint: Checkpoint) -> None:
    """Note which tensors share another's because the checkpoint holds one of them (mutated)."""
    ties = tied_names(checkpoint.model)
    for target, source in ties.items():
        if target in checkpoint.groups and source not in checkpoint.groups:
            target, source = source, target
        if target not in checkpoint.groups and source in checkpoint.groups:
            checkpoint.ties[target] = source
    for target, source in ties.items():
        if target not in checkpoint.groups and source in checkpoint.ties:
            checkpoint.ties.setdefault(target, checkpoint.ties[source])
