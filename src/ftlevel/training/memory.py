"""Activation recomputation, smaller micro-batches and allocator settings for limited memory.

If a step runs out of memory, micro-batches are halved, then gradient checkpointing is enabled. The
rows of a step stay the same; only dropout masks and the order of summation change. transformers'
`auto_find_batch_size` instead changes the batch size and restarts with partly trained weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import RunError, is_out_of_memory
from ftlevel.fast.fused_lora import skip_unused_outputs
from ftlevel.fast.likelihoods import base_model
from ftlevel.models.hardware import free_device_memory
from ftlevel.models.module_tree import get_stacks
from ftlevel.models.quantization import get_quantization_config
from ftlevel.training.plan.run import Run


def set_checkpointing(model: Any, run: Run) -> None:
    """Enable gradient checkpointing in all blocks of `model` (modified), if `run` uses it.

    Call after method and fast step are applied.
    """
    train = run.config.train
    if train.recomputes or run.recomputes:
        enable_checkpointing(base_model(model), offload=train.offload_activations)


def enable_checkpointing(base: Any, *, offload: bool = False) -> None:
    """Enable gradient checkpointing in `base` (modified); `offload` moves inputs to host memory."""
    base.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    skip_unused_outputs(list(chain(*get_stacks(base))))


def without_graph(tensor: Tensor) -> Tensor:
    """Returns `tensor` without its graph: a graph that saves its own output is never freed."""
    return tensor if tensor.grad_fn is None else tensor.detach()


class StepReducer:
    """Reduces the memory of a trainer's steps after one ran out of memory.

    Attributes:
        done: one record per reduction: `step`, and the new `tokens_per_micro_batch` or
            `gradient_checkpointing`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.done: list[dict[str, Any]] = []

    def can_reduce(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a step on `inputs` could use less memory; False with several processes."""
        trainer = self._trainer
        if trainer.args.world_size > 1 or trainer.fast is None:
            return False
        return _can_split(inputs) or self._can_checkpoint()

    def reduce(self, model: Any, rows: Sequence[Encoded], inputs: Mapping[str, Any]) -> Any:
        """Halve micro-batches, else enable checkpointing; returns `rows` collated for a retry."""
        model.zero_grad()
        free_device_memory()
        trainer, step = self._trainer, self._trainer.state.global_step + 1
        when = f"at step {step}"
        if _can_split(inputs):
            tokens = self._halve()
            self._note({"step": step, "tokens_per_micro_batch": tokens})
            trainer.warn(
                f"out of memory {when}: micro-batches have {tokens:,} tokens from now on, half "
                "as many as before; the rows of a step are the same."
            )
        else:
            self._checkpoint()
            self._note({"step": step, "gradient_checkpointing": True})
            trainer.warn(
                f"out of memory {when}, with a single row: activations are recomputed from now "
                f"on (--gradient-checkpointing): slower, with the same result."
            )
        return trainer.on_device(trainer.data_collator(rows))

    def resume(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """When a run resumes with the fast step, repeat the reductions recorded in `notes`."""
        for note in notes if self._trainer.fast is not None else ():
            if "tokens_per_micro_batch" in note:
                self._halve()
            elif "gradient_checkpointing" in note:
                self._checkpoint()
            else:
                continue
            self.done.append(dict(note))

    def _note(self, note: dict[str, Any]) -> None:
        self.done.append(note)
        self._trainer.note(note)

    def _halve(self) -> int:
        trainer = self._trainer
        plan = trainer.fast.plan
        trainer.fast.plan = replace(plan, tokens=trainer.data_collator.halve_tokens())
        return trainer.fast.plan.tokens // plan.workers

    def _can_checkpoint(self) -> bool:
        base: Any = base_model(self._trainer.model)
        supports = getattr(base, "supports_gradient_checkpointing", False)
        fast = self._trainer.fast
        # Parallel workers draw dropout from their own generator, which recomputation lacks.
        is_random = fast is not None and fast.plan.workers > 1 and fast.plan.is_random
        blocks = chain(*get_stacks(base))
        are_all = all(getattr(block, "gradient_checkpointing", False) for block in blocks)
        return supports and not are_all and not is_random

    def _checkpoint(self) -> None:
        trainer = self._trainer
        # The prefix's layout is not available during recomputation (see `plan_fast`).
        trainer.fast.plan = replace(trainer.fast.plan, shared_prefix=False)
        trainer.data_collator.disable_shared_prefix()
        enable_checkpointing(base_model(trainer.model))


def _can_split(inputs: Mapping[str, Any]) -> bool:
    return bool(inputs.get("has_parts"))


@contextlib.contextmanager
def explain_out_of_memory(run: Run) -> Iterator[None]:
    """Convert out-of-memory errors in the `with` block into a RunError that lists remedies."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise RunError(f"out of memory: {text[:200]}. {_suggest(run)}") from error


def _suggest(run: Run) -> str:
    train, rows = run.config.train, run.config.train.per_device_train_batch_size
    suggestions = []
    if rows > 1:
        factor = next(number for number in range(2, rows + 1) if rows % number == 0)
        suggestions.append(
            f"--per-device-train-batch-size {rows // factor} --gradient-accumulation-steps "
            f"{train.gradient_accumulation_steps * factor} (the same steps)"
        )
    if not train.recomputes:
        suggestions.append("--gradient-checkpointing")
    suggestions += get_quant_flags(run)
    if run.data.max_length:
        suggestions.append(f"a --max-length below {run.data.max_length:,}")
    suggestions.append("a smaller --model")
    return f"To use less memory: {'; '.join(suggestions)}."


def get_quant_flags(run: Run) -> list[str]:
    """Returns ["--quant 4bit"] if the base is unquantized and the method supports that, else []."""
    config, is_stored = run.config, get_quantization_config(run.model.config) is not None
    quant = config.quant.model_copy(update={"kind": "4bit"})
    can_quantize = not is_stored and config.quant.kind == "none"
    return ["--quant 4bit"] * (can_quantize and not config.method.validate_quant(quant))
