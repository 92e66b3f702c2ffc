"""Optimizer steps that do not fit into memory, made smaller without another result.

Micro-batches get half as many tokens, as often as it takes; then activations are recomputed
(gradient checkpointing). The rows of a step stay, and so its loss and gradient but for the order of
sums and the random numbers of dropout. transformers' `auto_find_batch_size` changes the rows of a
step, and begins the run anew with weights that were trained already.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import lengths_of
from ftlevel.errors import is_out_of_memory
from ftlevel.fast.head.loss import base_model
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.module_tree import find_stacks
from ftlevel.training.memory.checkpointing import recompute_blocks


class SmallerSteps:
    """Make the steps of a trainer smaller from the one on that does not fit.

    Args:
        trainer: the `FtlevelTrainer` of the run, which has this.

    Attributes:
        done: what was done: the step, 0 for before the first, and the tokens of a micro-batch
            since, or that gradients are checkpointed.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.done: list[dict[str, Any]] = []

    def can(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there is anything left to do; alone, as other processes are not asked."""
        trainer = self._trainer
        if trainer.args.world_size > 1 or trainer.fast is None:
            return False
        return _has_parts(inputs) or self._can_checkpoint()

    def make(self, model: Any, rows: Sequence[Encoded], inputs: Mapping[str, Any]) -> Any:
        """Return the inputs of a step of `rows` that did not fit, in smaller parts.

        What the step has added to the gradient is undone, and its rows are counted once.

        Args:
            model: whose gradients are undone (mutated).
            rows: of the step.
            inputs: as they did not fit.
        """
        model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trainer, step = self._trainer, self._step()
        where = f"at step {step}" if step else "before the first step"
        if _has_parts(inputs):
            tokens = self._halve()
            self._note({"step": step, "tokens_per_micro_batch": tokens})
            trainer.warn(
                f"out of memory {where}: micro-batches have {tokens:,} tokens from now on, half "
                "as many as before; the rows of a step are the same."
            )
        else:
            self._checkpoint()
            self._note({"step": step, "gradient_checkpointing": True})
            trainer.warn(
                f"out of memory {where}, with a row alone: activations are recomputed from now on "
                "(--gradient-checkpointing), which takes longer; what is learned is the same."
            )
        return trainer.on_device(trainer.data_collator(rows))

    def go_on(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """Do what was done before a checkpoint again.

        Args:
            notes: of the run, until it.
        """
        for note in notes:
            if "tokens_per_micro_batch" in note:
                self._halve()
            elif "gradient_checkpointing" in note:
                self._checkpoint()
            else:
                continue
            self.done.append(dict(note))

    def try_longest(self, rows: Sequence[Encoded], dtype: str) -> None:
        """Compute the micro-batch of the longest rows forward and backward, and forget it.

        Where memory is too small for it, the run is told before it begins, and not hours later.

        Args:
            rows: that are trained on.
            dtype: compute precision's name.

        Raises:
            RuntimeError, MemoryError: of a library, where nothing makes it fit.
        """
        trainer = self._trainer
        if trainer.args.world_size > 1 or trainer.fast is None:
            return
        count = trainer.args.train_batch_size
        order = np.argsort(-lengths_of(rows), kind="stable")[:count]
        longest = [rows[int(at)] for at in order]
        model, workers = trainer.model, trainer.fast.plan.workers
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), trainer.computing_alone(dtype):
            inputs = trainer.on_device(trainer.data_collator(longest))
            while True:
                parts = sorted(inputs["micro_batches"], key=lambda p: -p["input_ids"].numel())
                some = {**inputs, "micro_batches": [dict(part) for part in parts[:workers]]}
                some.pop("rows")
                try:
                    trainer.compute_batch(model, some)
                    break
                except Exception as error:
                    if not (is_out_of_memory(error) and self.can(inputs)):
                        raise
                inputs = self.make(model, longest, inputs)
        model.zero_grad()
        trainer.take_step_loss()

    def _step(self) -> int:
        trainer = self._trainer
        return 0 if trainer.is_alone else trainer.state.global_step + 1

    def _note(self, note: dict[str, Any]) -> None:
        self.done.append(note)
        self._trainer.note(note)

    def _halve(self) -> int:
        """Give micro-batches half as many tokens, and return how many that is."""
        trainer = self._trainer
        if trainer.fast is None or not isinstance(trainer.data_collator, StepCollator):
            raise TypeError("only a fast step has micro-batches")
        plan = trainer.fast.plan
        trainer.fast.plan = replace(plan, tokens=trainer.data_collator.halve())
        return trainer.fast.plan.tokens // plan.workers

    def _can_checkpoint(self) -> bool:
        base: Any = base_model(self._trainer.model)
        supports = getattr(base, "supports_gradient_checkpointing", False)
        fast = self._trainer.fast
        # Parallel workers with dropout draw by a generator that a recomputation does not have.
        is_random = fast is not None and fast.plan.workers > 1 and fast.plan.is_random
        blocks = chain(*find_stacks(base))
        are_all = all(getattr(block, "gradient_checkpointing", False) for block in blocks)
        return supports and not are_all and not is_random

    def _checkpoint(self) -> None:
        trainer = self._trainer
        if trainer.fast is None or not isinstance(trainer.data_collator, StepCollator):
            raise TypeError("only a fast step is made smaller")
        # A recomputation would find the prefix's layout gone, as `plan_fast` says.
        trainer.fast.plan = replace(trainer.fast.plan, shared_prefix=False)
        trainer.data_collator.share_no_prefix()
        recompute_blocks(base_model(trainer.model))


def _has_parts(inputs: Mapping[str, Any]) -> bool:
    """Whether a micro-batch of the step has several rows."""
    return bool(inputs.get("has_parts"))
