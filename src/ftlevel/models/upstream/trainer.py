"""Trainer's private names, beside those that our subclass overrides."""

from __future__ import annotations

from typing import Any


def leave_sharded(trainer: Any) -> None:
    """Have Trainer leave a model as it is (mutated), of which each process holds a part.

    It does so with models that transformers has sharded as it loaded them, and has accelerate wrap
    no other in DDP, which takes no DTensors. Asked for in its constructor, it would refuse to
    write checkpoints; `training.sharding` writes them.

    Args:
        trainer: a Trainer before its first step.
    """
    trainer.is_distributed_loading_by_transformers = True


def use_one_gpu(arguments: Any) -> None:
    """Have Trainer use one GPU of a process (mutated), however many it sees.

    With several it wraps the model in `nn.DataParallel`, which cuts the rows of a step over
    threads, or takes as many rows more a step: neither is the step that was planned. Each process
    of a run has a GPU of its own.

    Args:
        arguments: `TrainingArguments`.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # n_gpu sets it up
