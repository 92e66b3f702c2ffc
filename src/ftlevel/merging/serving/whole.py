"""A whole model for a server: what it must answer, recorded beside it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.config import ExportConfig
from ftlevel.config.commands.servers import SERVERS
from ftlevel.merging.serving.answers import ask
from ftlevel.merging.serving.entry import Entry
from ftlevel.merging.serving.recorded import record, write_served
from ftlevel.merging.serving.start import start_model
from ftlevel.models.sources import ModelSource
from ftlevel.trained.load import load_found
from ftlevel.trained.model_ref import ModelRef


def start_of(config: ExportConfig) -> list[str]:
    """Return the commands that serve the whole model of `config`; none without `--for`."""
    if config.server is None:
        return []
    return start_model(SERVERS[config.server], config.out, config.out.stem)


def record_whole(
    path: Path,
    config: ExportConfig,
    found: ModelRef,
    source: ModelSource,
    dtype: str,
    device: str,
) -> None:
    """Write served.json at `path`: what the model at `source` answers in float32, and its base.

    Args:
        path: of the file.
        config: what was asked for.
        found: the run, adapter or model that was named.
        source: the model that was made of it.
        dtype: of the weights that are served.
        device: torch device type.
    """
    name = config.out.stem
    card = replace(found.card, quantization={"kind": "none"}, dtype="float32")
    whole = Entry(name, replace(found, source=source, directory=None, card=card))
    prompts = whole.prompts()
    trained = ask(load_found(whole.found, device).model, whole, prompts)
    base = None
    if found.directory is not None and whole.answers:
        entry = Entry(name, found)
        base = ask(load_found(entry.in_float32(with_adapter=False), device).model, entry, prompts)
    gc.collect()
    recorded = record(name, config.out.name if config.out.suffix else ".", None, prompts,
                      {"trained": trained, "base": base})  # fmt: skip
    facts: Mapping[str, Any] = {
        "model": config.model, "server": config.server, "base": None, "start": start_of(config),
        "file_format": config.format, "dtype": dtype,
    }  # fmt: skip
    write_served(path, facts, [recorded])
