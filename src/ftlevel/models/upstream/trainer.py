"""Trainer's private names, beside those that our subclass overrides."""

from __future__ import annotations

from typing import Any


def use_one_gpu(arguments: Any) -> None:
    """Have Trainer use one GPU of a process (mutated), however many it sees.

    With several it wraps the model in `nn.DataParallel`, which cuts the rows of a step over
    threads, or takes as many rows more a step: neither is the step that was planned. Each process
    of a run has a GPU of its own.

    Args:
        arguments: `TrainingArguments`.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # n_gpu sets it up
