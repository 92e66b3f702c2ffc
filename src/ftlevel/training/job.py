"""Resolve a training job: the run and its processes, checked as far as possible without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.hub import find_repository
from ftlevel.artifacts.run_directory import check_output, describe_recipe
from ftlevel.config import TrainConfig
from ftlevel.events import Listener
from ftlevel.training.finish import StartTime
from ftlevel.training.forecast.fits import MemoryEstimate, estimate_memory
from ftlevel.training.forecast.micro_batch import choose_micro_batch
from ftlevel.training.inputs import BoundInputs
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import check_packages, infer_task, resolve
from ftlevel.training.plan.run import Run
from ftlevel.training.plan.schedule import find_default_model_warnings, find_warnings
from ftlevel.training.plan.trainable import find_adapter_warnings, size_choices
from ftlevel.training.processes import Processes, resolve_processes, started_processes
from ftlevel.training.resume import (
    check_base_outlives,
    check_base_stays,
    stored_micro_batch_tokens,
    stored_prompt_version,
)
from ftlevel.training.sharding import check_can_shard
from ftlevel.training.teacher import find_auxiliary_models

if TYPE_CHECKING:
    from transformers import TrainerCallback


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
    inputs: BoundInputs, command_line: CommandLine, listener: Listener, *, dry_run: bool
) -> TrainingJob:
    """Resolve and show a run in every process; a failure in one is raised in all.

    Raises ConfigError for every problem that can be detected without weights.
    """
    processes = started_processes()
    train = resolve_processes(inputs.config.train, processes, rows_only=dry_run)
    config = inputs.config.model_copy(update={"train": train})
    if dry_run:  # one process is enough
        processes = Processes()
    processes.join()

    def resolve_here() -> tuple[Run, MemoryEstimate]:
        found = _resolve(config, inputs, listener, processes.count, try_method=dry_run)
        processes.take_device(found[0].model.device)
        if not dry_run:
            check_can_shard(found[0], processes.count)
        return found

    run, memory = processes.in_all(resolve_here)
    if run.config.speed.tokens_per_micro_batch == "memory":
        tokens = stored_micro_batch_tokens(run.config.output)
        sized = choose_micro_batch(run, processes, tokens)
        listener.choices("train", sized.choices[len(run.choices) :])
        run = sized
    recipe = describe_recipe(command_line.recipe) if command_line.recipe else None
    return TrainingJob(
        run, processes, memory, listener, inputs.callbacks, recipe, command_line.start
    )


def _resolve(
    config: TrainConfig,
    inputs: BoundInputs,
    listener: Listener,
    processes: int,
    *,
    try_method: bool,
) -> tuple[Run, MemoryEstimate]:
    """Resolve `config`, check it, and show what was chosen with all warnings."""
    output = config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config.model, config.speed, output)
    if output.push_to_hub is not None:
        named = {"push_to_hub": find_repository(output.push_to_hub)}
        config = config.model_copy(update={"output": output.model_copy(update=named)})
    check_base_stays(config.model, output, config.data.chat_template)
    listener.stage("reading data and model configuration")
    config, adapter, notes = resolve_adapter(config)
    config, why = infer_task(config)
    run = resolve(
        config,
        progress=listener.progress,
        why_task=why,
        adapter=adapter,
        prompt_version=stored_prompt_version(output),
    )
    choices = [*inputs.choices, *run.choices]
    run = replace(run, choices=choices, written_base=inputs.written_base)
    check_base_outlives(run)
    run = replace(run, beside=find_auxiliary_models(run))
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
