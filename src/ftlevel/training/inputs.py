"""Rows, models and callbacks that a program passes to `train` as Python objects."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.files import base_digest
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import DataConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.section import Choice
from ftlevel.config.sections import wrap_rows
from ftlevel.errors import ConfigError
from ftlevel.models.in_memory import place_model
from ftlevel.training.plan.run import Run
from ftlevel.training.summary import describe_base
from ftlevel.workspace import Workspace

if TYPE_CHECKING:
    from transformers import TrainerCallback

BASE = "base"
"""Subdirectory of a run with a model that was passed as an object and has no other file."""


@dataclass(frozen=True)
class TrainInputs:
    """Python objects passed to `train`; `callbacks` run after ftlevel's own."""

    dataset: Any = None
    eval_dataset: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class BoundInputs:
    """The configuration with a name or path for every passed object, and lines for the screen.

    `written_base` is the directory that the model was written to; None if it was not.
    """

    config: TrainConfig
    callbacks: Sequence[TrainerCallback] = ()
    written_base: Path | None = None
    choices: tuple[Choice, ...] = ()


def bind_inputs(config: TrainConfig, inputs: TrainInputs, stack: ExitStack) -> BoundInputs:
    """Return `config` with the objects bound; a written model exists until `stack` closes.

    Raises ConfigError if an object has the wrong type, or is also set in the configuration.
    """
    _check_callbacks(inputs.callbacks)
    rows = {"dataset": inputs.dataset, "validation_file": inputs.eval_dataset}
    names = {
        key: _name(key, value, config.data) for key, value in rows.items() if value is not None
    }
    if names:
        config = config.with_sections(data=config.data.model_copy(update=names))
    if inputs.model is None and inputs.tokenizer is None:
        return BoundInputs(config, inputs.callbacks)
    folder = stack.enter_context(Workspace("model"))
    placed = place_model(inputs.model, inputs.tokenizer, config.model, Path(folder))
    sections: dict[str, Any] = {
        "model": config.model.model_copy(update={"name_or_path": placed.name})
    }
    if placed.quant is not None:
        sections["quant"] = _own_quant(config.quant, placed.quant)
    config = config.with_sections(**sections)
    return BoundInputs(config, inputs.callbacks, placed.directory, (placed.choice,))


def _own_quant(wish: QuantConfig, own: QuantConfig) -> QuantConfig:
    """Return the quantization of a passed model; the configuration may only repeat it."""
    if wish.kind not in ("none", own.kind) or (wish.kind == own.kind and wish != own):
        raise ConfigError(
            f"quant is {wish.form}, and model= is quantized already: {own.form}. Drop quant, or "
            "give the model in floating point."
        )
    return own


def _name(key: str, value: Any, data: DataConfig) -> str:
    argument = "dataset" if key == "dataset" else "eval_dataset"
    if key in data.model_fields_set and getattr(data, key) is not None:
        raise ConfigError(
            f"{argument}= is given, and the configuration has data.{key} too. Use one of them."
        )
    named = wrap_rows(value)
    if not isinstance(named, str):
        raise ConfigError(
            f"{argument}= is of type {type(value).__name__}. Expected a DataFrame, a "
            "datasets.Dataset or DatasetDict, a list of dicts, or a file's name."
        )
    if isinstance(named, InMemoryDataset):
        named.said = argument
    return named


def _check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    from transformers import TrainerCallback

    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            what = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(
                f"callbacks= has {what}. Expected instances of transformers.TrainerCallback, such "
                f"as {what}()."
                if isinstance(callback, type)
                else f"callbacks= has one of type {what}. Expected instances of "
                "transformers.TrainerCallback."
            )


def store_base(run: Run, directory: RunDirectory, *, is_first: bool) -> tuple[Run, dict[str, Any]]:
    """Move a base that was written for the run into its directory; return run and base facts."""
    if run.written_base is not None:
        place = directory.path.resolve() / BASE
        if is_first and not place.exists():
            shutil.move(run.written_base, place)
        source = replace(run.model.source, name=str(place), location=str(place))
        run = replace(run, model=replace(run.model, source=source))
    return run, base_facts(run)


def base_facts(run: Run) -> dict[str, Any]:
    """Return the facts of the base, with a digest of all bytes if it was written for the run."""
    facts, path = describe_base(run.model.source), run.model.source.path
    if run.written_base is None or path is None:
        return facts
    return {**facts, "digest": base_digest(path)}
