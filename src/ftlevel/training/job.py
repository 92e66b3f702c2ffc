"""Resolve a training job, with the Python objects passed to `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.hub import find_repository
from ftlevel.artifacts.run_directory import check_output, describe_recipe
from ftlevel.config import DataConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.section import Choice
from ftlevel.config.sections import wrap_rows
from ftlevel.errors import ConfigError
from ftlevel.evaluation.server import check_server
from ftlevel.events import Listener
from ftlevel.models.in_memory import place_model
from ftlevel.training.finish import StartTime
from ftlevel.training.forecast.alternatives import choose_micro_batch
from ftlevel.training.forecast.fits import MemoryEstimate, estimate_memory
from ftlevel.training.plan.adapter import find_adapter_warnings, resolve_adapter
from ftlevel.training.plan.resolve import check_packages, infer_task, resolve
from ftlevel.training.plan.run import Run, size_choices
from ftlevel.training.plan.schedule import find_default_model_warnings, find_warnings
from ftlevel.training.processes import Processes, resolve_processes, started_processes
from ftlevel.training.resume import (
    check_base_not_overwritten,
    check_same_base,
    stored_micro_batch_tokens,
    stored_prompt_version,
)
from ftlevel.training.sharding import check_can_shard
from ftlevel.training.teacher import find_auxiliary_models
from ftlevel.workspace import Workspace

if TYPE_CHECKING:
    from transformers import TrainerCallback


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


def _own_quant(requested: QuantConfig, quant: QuantConfig) -> QuantConfig:
    """Return the quantization of a passed model; the configuration may only repeat it."""
    if requested.kind not in ("none", quant.kind) or (
        requested.kind == quant.kind and requested != quant
    ):
        raise ConfigError(
            f"quant is {requested.form}, and model= is quantized already: {quant.form}. Drop "
            f"quant, or "
            "give the model in floating point."
        )
    return quant


def _name(key: str, value: Any, data: DataConfig) -> str:
    argument = "dataset" if key == "dataset" else "eval_dataset"
    if key in data.model_fields_set and getattr(data, key) is not None:
        raise ConfigError(
            f"{argument}= is given, and the configuration has data.{key} too. Use one of them."
        )
    name = wrap_rows(value)
    if not isinstance(name, str):
        raise ConfigError(
            f"{argument}= is of type {type(value).__name__}. Expected a DataFrame, a "
            "datasets.Dataset or DatasetDict, a list of dicts, or a file's name."
        )
    if isinstance(name, InMemoryDataset):
        name.said = argument
    return name


def _check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    from transformers import TrainerCallback

    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(
                f"callbacks= has {name}. Expected instances of transformers.TrainerCallback, such "
                f"as {name}()."
                if isinstance(callback, type)
                else f"callbacks= has one of type {name}. Expected instances of "
                "transformers.TrainerCallback."
            )


@dataclass(frozen=True)
class CommandLine:
    """Recipe path and process start time of a run started from the command line."""

    recipe: Path | None
    start: StartTime


@dataclass(frozen=True)
class TrainingJob:
    """A run before its weights load, and what its training needs besides.

    Attributes:
        processes: the processes that train together.
        memory: the estimate shown at the start.
        callbacks: the caller's, run after ftlevel's own.
        recipe: path and git state of the recipe; None without one.
    """

    run: Run
    processes: Processes
    memory: MemoryEstimate
    listener: Listener
    callbacks: Sequence[TrainerCallback]
    recipe: Mapping[str, Any] | None
    start: StartTime


def resolve_job(
    inputs: BoundInputs, command: CommandLine, listener: Listener, *, dry_run: bool
) -> TrainingJob:
    """Resolve and show a run in every process; a failure in one is raised in all.

    Raises ConfigError for every problem that can be detected without weights.
    """
    processes = started_processes()
    train = resolve_processes(inputs.config.train, processes, rows_only=dry_run)
    inputs = replace(inputs, config=inputs.config.model_copy(update={"train": train}))
    if dry_run:  # one process is enough
        processes = Processes()
    processes.join()

    def resolve_here() -> tuple[Run, MemoryEstimate]:
        run, memory = _resolve(inputs, listener, processes.count, try_method=dry_run)
        processes.take_device(run.model.device)
        if not dry_run:
            check_can_shard(run, processes.count)
        return run, memory

    run, memory = processes.in_all(resolve_here)
    if run.config.speed.tokens_per_micro_batch == "memory":
        tokens = stored_micro_batch_tokens(run.config.output)
        sized = choose_micro_batch(run, processes, tokens)
        listener.choices("train", sized.choices[len(run.choices) :])
        run = sized
    recipe = describe_recipe(command.recipe) if command.recipe else None
    return TrainingJob(run, processes, memory, listener, inputs.callbacks, recipe, command.start)


def _resolve(
    inputs: BoundInputs, listener: Listener, processes: int, *, try_method: bool
) -> tuple[Run, MemoryEstimate]:
    """Resolve the configuration, check it, and show the choices and all warnings."""
    config, output = inputs.config, inputs.config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config.model, config.speed, output)
    if output.push_to_hub is not None:
        repository = {"push_to_hub": find_repository(output.push_to_hub)}
        config = config.model_copy(update={"output": output.model_copy(update=repository)})
    check_same_base(config.model, output, config.data.chat_template)
    listener.stage("reading data and model configuration")
    config, adapter, notes = resolve_adapter(config)
    config, task_reason = infer_task(config)
    run = resolve(
        config,
        progress=listener.progress,
        why_task=task_reason,
        adapter=adapter,
        prompt_version=stored_prompt_version(output),
    )
    choices = [*inputs.choices, *run.choices]
    run = replace(run, choices=choices, written_base=inputs.written_base)
    check_base_not_overwritten(run)
    run = replace(run, auxiliary=find_auxiliary_models(run))
    check_server(config.rl)
    sizes = size_choices(run, try_method=try_method)
    memory = estimate_memory(run, processes)
    listener.choices("train", [memory.choice(), *run.choices, *sizes])
    notes += find_adapter_warnings(adapter, run) if adapter else []
    rows = len(run.data.train), len(run.data.validation)
    for warning in [
        *notes,
        *find_default_model_warnings(config.model, config.data),
        *find_warnings(config.train, *rows, new_head=bool(run.model.new_heads)),
    ]:
        listener.warn(warning)
    return run, memory
