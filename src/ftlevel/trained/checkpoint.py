"""Checkpoints of a run, which are used like what it gives at its end, where they can be."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from shlex import quote

from ftlevel.artifacts.cards import CARD
from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.artifacts.ownership import CHECKPOINTS
from ftlevel.artifacts.run_directory import run_of
from ftlevel.config.methods.lora import INSIDE_BASE
from ftlevel.errors import InputError
from ftlevel.trained.plain_peft import ADAPTER_CONFIG
from ftlevel.workspace import Workspace

_PARTS = "shard-*.safetensors"
"""What processes write that share a model out, each its rows."""


def check_whole_adapter(directory: Path) -> None:
    """Refuse a checkpoint whose adapter is not one of the untouched base.

    Raises:
        InputError: it is such a one, or its configuration is damaged.
    """
    run = run_of(directory) if directory.absolute().parent.name == CHECKPOINTS else None
    if run is None or (directory / CARD).is_file() or not (directory / ADAPTER_CONFIG).is_file():
        return
    from ftlevel.methods.merging import read_peft_config  # it imports PEFT's tuners

    init = read_peft_config(directory).get("init_lora_weights")
    if init in INSIDE_BASE:
        raise InputError(
            f"{directory} is a checkpoint of a run that began with init_lora_weights={init!r}, "
            "inside the base's weights: its adapter is made one of the untouched base at the end. "
            f"Go on with it: ftlevel train --output-dir {quote(str(run))} --resume"
        )


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
    from ftlevel.models.upstream.parts import put_together  # it imports torch.distributed

    damage = find_damage(directory)
    if damage is not None:
        raise InputError(f"{directory} cannot be put together: {damage}. Take another checkpoint.")
    held = Workspace("checkpoint")
    put_together(directory, Path(held.name))
    for path in directory.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, Path(held.name) / path.name)
    return held
