"""Make checkpoints of sharded training usable as models."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.errors import InputError
from ftlevel.workspace import Workspace

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
        raise InputError(f"{directory} cannot be put together: {damage}. Take another checkpoint.")
    held = Workspace("checkpoint")
    merge_shards(directory, Path(held.name))
    for path in directory.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, Path(held.name) / path.name)
    return held
