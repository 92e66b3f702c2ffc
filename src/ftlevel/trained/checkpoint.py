"""Checkpoints of a run, which are used like what it gives at its end, where they can be."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.errors import InputError
from ftlevel.workspace import Workspace

_PARTS = "shard-*.safetensors"
"""What processes write that share a model out, each its rows."""


def whole_model(directory: Path) -> Path:
    """Return where the model of a run is whole: `directory`, or what its parts were put into.

    That is a temporary directory, kept as long as this process.

    Raises:
        InputError: a part is missing or damaged.
    """
    if not any(directory.glob(_PARTS)):
        return directory
    return Path(_together(directory.resolve()).name)


@functools.cache
def _together(directory: Path) -> Workspace:
    from ftlevel.models.upstream.shards import put_together  # it imports torch.distributed

    damage = find_damage(directory)
    if damage is not None:
        raise InputError(f"{directory} cannot be put together: {damage}. Take another checkpoint.")
    held = Workspace("checkpoint")
    put_together(directory, Path(held.name))
    for path in directory.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, Path(held.name) / path.name)
    return held
