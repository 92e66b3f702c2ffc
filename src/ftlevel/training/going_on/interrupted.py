"""What an interrupted run says: what was kept, and how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.errors import Interrupted


def describe_stop(run: RunDirectory, state: Any) -> str:
    """Say what a run that was stopped after a step has.

    Args:
        run: its directory.
        state: Trainer's, whose step has a checkpoint.
    """
    is_longer = run.adapter.exists()
    adapter = "the adapter is of its former end" if is_longer else "there is no adapter yet"
    return (
        f"interrupted after step {state.global_step:,} of {state.max_steps:,}; "
        f"{run.checkpoints / f'checkpoint-{state.global_step}'} is kept, and {adapter}. "
        f"{_go_on(run)}"
    )


def describe_end(run: RunDirectory, config: TrainConfig, summary: Mapping[str, Any]) -> str:
    """Say that a run is finished, and what would make it longer.

    Args:
        run: its directory.
        config: the whole configuration.
        summary: what summary.json holds.
    """
    steps, best = summary["steps"], summary.get("best") or {}
    planned, train = summary.get("planned_steps", steps), config.train
    length = (
        f"--max-steps {2 * planned}"
        if train.max_steps
        else f"--num-train-epochs {2 * train.num_train_epochs:g}"
    )
    early = " (it stopped early)" if best.get("stopped_early") else ""
    newest, _ = checkpoints.newest_whole(run.checkpoints)
    more = (
        f"A longer run goes on from there: --resume {length}."
        if newest
        else f"To train on from its adapter: --adapter {quote(str(run.path))}, and another "
        "--output-dir."
    )
    return (
        f"{run.path} is finished: {steps:,} of {planned:,} steps{early}, and nothing is "
        f"left to train. {more}"
    )


@contextlib.contextmanager
def telling_what_is_kept(run: RunDirectory) -> Iterator[None]:
    """Say what the run has when Ctrl-C ends the block at once, in the middle of a step or a save.

    Raises:
        Interrupted: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        whole, _ = checkpoints.newest_whole(run.checkpoints)
        kept = f"{whole} is kept. {_go_on(run)}" if whole else "there was no checkpoint yet."
        raise Interrupted(f"interrupted at once; {kept}") from None


def _go_on(run: RunDirectory) -> str:
    return f"Go on with: ftlevel train --output-dir {quote(str(run.path))} --resume"
