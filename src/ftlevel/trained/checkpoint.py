"""Checkpoints of a run, which are used like what it gives at its end, where they can be."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from ftlevel.artifacts.cards import CARD
from ftlevel.artifacts.ownership import CHECKPOINTS
from ftlevel.artifacts.run_directory import run_of
from ftlevel.config.methods.lora import INSIDE_BASE
from ftlevel.errors import InputError
from ftlevel.trained.plain_peft import ADAPTER_CONFIG


def check_whole_adapter(directory: Path) -> None:
    """Refuse a checkpoint whose adapter is not one of the untouched base.

    Raises:
        InputError: it is such a one.
    """
    run = run_of(directory) if directory.absolute().parent.name == CHECKPOINTS else None
    if run is None or (directory / CARD).is_file() or not (directory / ADAPTER_CONFIG).is_file():
        return
    init = json.loads((directory / ADAPTER_CONFIG).read_text()).get("init_lora_weights", True)
    if init in INSIDE_BASE:
        raise InputError(
            f"{directory} is a checkpoint of a run that began with init_lora_weights={init!r}, "
            "inside the base's weights: its adapter is made one of the untouched base at the end. "
            f"Go on with it: ftlevel train --output-dir {quote(str(run))} --resume"
        )
