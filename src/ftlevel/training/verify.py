"""Verify the fast step against the plain step, on a few rows or on whole steps.

In float32 both differ in summation order only, so even an error of 0.1 % shows, which bfloat16
would hide. The effect of order is measured by comparing two plain steps with different rounding
errors.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.section import Choice
from ftlevel.data.encoding.fit import prompt_length
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.errors import is_out_of_memory
from ftlevel.events import Listener
from ftlevel.fast.plan import get_dropout
from ftlevel.methods import METHODS
from ftlevel.models.hardware import (
    exact_float32,
    free_device_memory,
    free_memory_bytes,
    has_forced_tf32,
)
from ftlevel.models.upstream.quantizers import with_float_inputs
from ftlevel.models.upstream.tensors import direct_tensors, inner_tensors
from ftlevel.trained.generation import batches
from ftlevel.training.build_trainer import create_trainer
from ftlevel.training.model import PreparedModel, is_sharded
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState
from ftlevel.training.step_comparison import (
    FLOAT32_EPSILON,
    MAX_KINK_DISTANCE,
    Bounds,
    FastStepError,
    GradientDifference,
    StepComparison,
    StepResult,
    Steps,
    add_differences,
    compare_gradients,
    perturb_weights,
    total,
)

HALF_DTYPES = (torch.bfloat16, torch.float16)
NUM_COPIES = 4
"""Copies of all trainable tensors in memory during a comparison: two gradients, the initial values,
and one in transfer."""
MEMORY_RATIO = 2 / 3
"""Share of free memory for these copies and the model in float32. 8B parameters take half of 64 GB,
which an 80 GB GPU has left."""


@contextlib.contextmanager
def cast_to_float32(model: torch.nn.Module) -> Iterator[None]:
    """Convert all half-precision weights of `model` (modified) to float32 inside the `with` block.

    `evaluation.two_models.in_float32` converts a module only while it runs. This function also
    supports backward passes, threads, and functions that read weights of modules they do not call.
    Quantized weights are unchanged, but dequantize to float32.
    """
    attributes = [(*attribute, getattr(*attribute)) for attribute in _get_4bit_dtypes(model)]
    for owner, name, _ in attributes:
        setattr(owner, name, torch.float32)
    try:
        with _cast(torch.float32, _tensors_of(model, HALF_DTYPES)):
            yield
    finally:
        for owner, name, dtype in attributes:
            setattr(owner, name, dtype)


@contextlib.contextmanager
def cast_to_float64(model: torch.nn.Module) -> Iterator[None]:
    """Convert all float32 weights of `model` (modified) to float64 inside the `with` block.

    What transformers always computes in float32, such as a norm's mean of squares, stays float32.
    """
    with _cast(torch.float64, _tensors_of(model, (torch.float32,))):
        yield


@contextlib.contextmanager
def _cast(dtype: torch.dtype, tensors: list[Tensor]) -> Iterator[None]:
    originals = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in originals:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


def fits_in_float32(model: torch.nn.Module, device: str) -> bool:
    """Returns whether memory suffices to compare gradients in float32."""
    return _fits(model, torch.float32, _tensors_of(model, HALF_DTYPES), device)


def fits_in_float64(model: torch.nn.Module, device: str) -> bool:
    """Returns whether `model` is all float32 and not sharded, and `device` has float64 and memory.

    Processes that share a model must compute equally many steps, so they compute none in float64.
    """
    wide = _tensors_of(model, (torch.float32,))
    other_tensors = {id(tensor) for tensor in model.parameters()} - {id(tensor) for tensor in wide}
    if other_tensors or device == "mps" or is_sharded(model):
        return False
    return _fits(model, torch.float64, wide, device)


def _fits(model: torch.nn.Module, dtype: torch.dtype, tensors: list[Tensor], device: str) -> bool:
    wide = sum(tensor.numel() for tensor in tensors)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dtype.itemsize * (wide + NUM_COPIES * trained) < MEMORY_RATIO * free_memory_bytes(device)


def _tensors_of(model: torch.nn.Module, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """Returns the unquantized parameters and buffers with a dtype in `dtypes`, each once."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for own in direct_tensors(module):
            for tensor in own.values():
                if tensor is not None and tensor.dtype in dtypes and not inner_tensors(tensor):
                    tensors[id(tensor)] = tensor
    return list(tensors.values())


def _get_4bit_dtypes(model: torch.nn.Module) -> list[tuple[Any, str]]:
    attributes: list[tuple[Any, str]] = []
    for module in model.modules():
        for tensor in direct_tensors(module)[0].values():
            if (state := getattr(tensor, "quant_state", None)) is not None:
                attributes.append((state, "dtype"))
                attributes += [(module, "compute_dtype")] * hasattr(module, "compute_dtype")
    return attributes


MAX_TOKENS = 256
"""Maximal tokens of the compared rows, which cost less than one step of most runs."""
MAX_ROWS = 4
NUM_CANDIDATES = 64
MAX_ROW_LENGTH = 1_024
"""Maximal length of a row that cannot be truncated; longer rows are skipped."""


def select_compared_rows(rows: Sequence[Encoded]) -> list[Encoded]:
    """Returns a few short rows among the first, truncated if possible; [] if all are too long."""
    first = [
        short for row in rows[:NUM_CANDIDATES] if (short := truncate_example(row, MAX_TOKENS // 2))
    ]
    selected: list[Encoded] = []
    tokens = 0
    for row in sorted(first, key=lambda row: len(row.input_ids)):
        tokens += len(row.input_ids)
        if len(selected) >= 2 and (tokens > MAX_TOKENS or len(selected) == MAX_ROWS):
            break
        selected.append(row)
    return selected


def truncate_example(row: Encoded, size: int) -> Encoded | None:
    """Returns `row` cut to `size` tokens, or as far as possible; None if above `MAX_ROW_LENGTH`.

    If labels are per token, the last `size` tokens up to the last target are kept; if the label is
    a number, the first `size`. In rows with several answers, only the prompt is cut. Rows whose
    labels are positions are not cut.
    """
    length = len(row.input_ids)
    if length <= size:
        return row
    labels = row.labels
    if len(row.sequences) > 1:  # only the prompt is cut
        num_excess = min(length - size, (prompt_length(row) or 1) - 1)
        return (
            row.without(num_excess)
            if num_excess > 0 and length - num_excess <= MAX_ROW_LENGTH
            else None
        )
    if isinstance(labels, list) and len(labels) == length:
        end = max((at + 1 for at, label in enumerate(labels) if label != IGNORED), default=length)
        window = slice(max(0, end - size), max(end, size))
        labels = labels[window]
    elif isinstance(labels, int | float):
        window = slice(0, size)
    else:
        return row if length <= MAX_ROW_LENGTH else None
    extras = {name: values[window] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[window], labels=labels, extras=extras)


class _NotFiniteError(Exception):
    """Raised if the loss of plain transformers and PEFT is not finite."""


STEPS = 3
"""Number of steps compared with --verify-fast."""


def verify_step(run: Run, model: PreparedModel, listener: Listener) -> StepComparison | None:
    """Compare the fast step with plain transformers and PEFT; None if it is not compared.

    The setting `speed.verify` selects the rows: those of the first steps (True), none (False), or a
    few (None). The model is restored. Raises FastStepError if rounding does not explain the
    difference.
    """
    full, rows = run.config.speed.verify, run.data.train
    if model.fast is None or full is False:
        return None
    batch_size = run.config.train.per_device_train_batch_size
    rows_per_step = run.config.train.rows_per_device_step
    first_rows = [] if full else select_compared_rows(rows)
    if not full and not first_rows:
        return None
    reason = _get_skip_reason(run, model.model)
    if not reason:
        if full:
            listener.stage("running the first steps with and without the fast step")
        dropout = bool(full and get_dropout(run.config.method, model.model, with_head=True))
        step_rows = (
            list(batches(rows[: STEPS * rows_per_step], rows_per_step)) if full else [first_rows]
        )
        with tempfile.TemporaryDirectory() as nowhere:
            output_dir = RunDirectory(Path(nowhere))
            trainer = create_trainer(run, model, output_dir, ResumeState(), Processes())
            steps = Steps(trainer, run.model.pad_id)
            verifier = _Verifier(steps, batch_size if full else len(first_rows), dropout)
            try:
                result = verifier.compare(step_rows, rate=run.schedule.learning_rate)
            except _NotFiniteError:  # GradientMonitor reports it at the first step
                return None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = "too little memory for it in float32"
            finally:
                model.model.zero_grad()
    if reason:
        choice = Choice("fast step", "not compared with the plain", reason)
        listener.choices("verify-fast", [choice])
        return None
    title = f"{result.steps} steps" if full else f"{result.rows} rows"
    text = f"loss differs by {result.loss:.2g}, gradients by {result.gradient:.2g}, relative"
    if result.exact is not None:
        text += f", from the plain step in float64 (its own differ by {result.exact:.1e})"
        text += "; both in float64, since rounding crosses a kink of an activation" * result.kinks
    choice = Choice(f"fast step verified on {title}", f"in float32, {text}")
    listener.choices("verify-fast", [choice])
    return result


def _get_skip_reason(run: Run, model: Any) -> str:
    """Returns why the steps cannot be compared in float32; empty if they can."""
    if is_sharded(model):
        if not METHODS[run.config.method.kind].is_adapter:
            return "the trained weights are sharded across processes"
        if run.model.dtype != "float32":
            return f"the sharded weights are in {run.model.dtype}"
    elif not fits_in_float32(model, run.model.device):
        return "too little memory for it in float32"
    if has_forced_tf32(run.model.device):
        return "NVIDIA_TF32_OVERRIDE rounds float32 products to TF32"
    return ""


def check_fast_step(
    run: Run, model: PreparedModel, processes: Processes, listener: Listener
) -> StepComparison | None:
    """Call `verify_step` in all processes; raises FastStepError in all if one has an error."""

    def verify() -> tuple[StepComparison | None, str]:
        try:
            return verify_step(run, model, listener), ""
        except FastStepError as error:
            return None, error.problem

    result, problem = processes.in_all(verify)
    free_device_memory()
    if problem := next(filter(None, processes.all_gather(problem)), ""):
        error = FastStepError(problem)
        error.is_reported = not processes.is_first
        raise error
    return result


@dataclass(frozen=True)
class _Verifier:
    """Compares the fast step with plain transformers and PEFT in float32."""

    steps: Steps
    batch_size: int
    dropout: bool

    def compare(self, steps_rows: Sequence[Sequence[Encoded]], *, rate: float) -> StepComparison:
        """Returns the differences of fast and plain steps; `steps_rows` has the rows of each step.

        After each step, the model is updated by the plain step's gradients with learning rate
        `rate`.
        """
        model, training = self.steps.model, self.steps.model.training
        result = StepComparison()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
        try:
            with perturb_weights(model), exact_float32(), with_float_inputs(model):
                for rows in steps_rows:
                    with cast_to_float32(model):
                        reference = self._compare(rows, result)
                    result = replace(result, steps=result.steps + 1, rows=result.rows + len(rows))
                    if rows is not steps_rows[-1]:
                        for name, parameter in model.named_parameters():
                            if name in reference.gradients:
                                parameter.grad = reference.gradients[name]
                        optimizer.step()
                        model.zero_grad()
        finally:
            model.train(training)
        return result

    def _compare(self, rows: Sequence[Encoded], result: StepComparison) -> StepResult:
        """Returns the plain step's result; records the fast step's difference in `result`."""
        steps = self.steps
        reference = self._reference(rows)
        if not math.isfinite(reference.loss):
            raise _NotFiniteError
        other = steps.perturbed_reference(rows)
        noise = compare_gradients(other.gradients, reference.gradients)
        term = FLOAT32_EPSILON * steps.trainer.objective.largest_term
        bounds = Bounds(noise, max(abs(other.loss - reference.loss), term))
        del other
        fast = steps.fast(rows)
        try:
            diff = _check(bounds, fast, reference)
        except FastStepError:
            # If rows share a prefix and its error, a different order underestimates the error.
            if (exact := self._in_float64(rows, self._reference)) is None:
                raise
            try:
                diff = _check(bounds, fast, exact)
            except FastStepError:
                # Rounding may move an activation over a kink, such as ReLU's at 0, which changes
                # its derivative but not its value. float64 avoids this.
                bounds.check_loss(fast.loss, exact.loss)
                error = total(compare_gradients(fast.gradients, exact.gradients).values()).distance
                if not error <= MAX_KINK_DISTANCE or steps.trainer.args.device.type != "cpu":
                    raise  # GPU kernels may differ in float64
                if (wide := self._in_float64(rows, steps.fast)) is None:
                    raise
                zero = Bounds(dict.fromkeys(noise, GradientDifference()), 0.0)
                diff = _check(zero, wide, exact)
                result.kinks = True
            errors = compare_gradients(reference.gradients, exact.gradients)
            bounds = replace(bounds, noise=add_differences(noise, errors))
            result.exact = max(result.exact or 0.0, total(errors.values()).distance)
        result.loss, result.gradient = map(max, diff, (result.loss, result.gradient))
        if self.dropout:
            expected = steps.with_dropout(rows, fused=False)
            dropped = steps.with_dropout(rows, fused=True)
            tensor_diffs = compare_gradients(dropped.gradients, expected.gradients)
            distance = bounds.check_gradients(tensor_diffs, "gradients with dropout")
            result.dropout = max(result.dropout or 0.0, distance)
        return reference

    def _reference(self, rows: Sequence[Encoded]) -> StepResult:
        return self.steps.reference(rows, self.batch_size)

    def _in_float64(
        self, rows: Sequence[Encoded], step: Callable[..., StepResult]
    ) -> StepResult | None:
        """Returns the result of `step` in float64; None if it cannot be computed."""
        model, device = self.steps.model, self.steps.trainer.args.device.type
        if not fits_in_float64(model, device):
            return None
        try:
            with cast_to_float64(model):
                return step(rows)
        except (RuntimeError, FastStepError):  # a kernel without float64 support
            return None


def _check(bounds: Bounds, step: StepResult, expected: StepResult) -> tuple[float, float]:
    loss = bounds.check_loss(step.loss, expected.loss)
    return loss, bounds.check_gradients(compare_gradients(step.gradients, expected.gradients))
