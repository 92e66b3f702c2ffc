"""Reload the saved adapter onto the same base, and check that it equals the trained model.

The base is not loaded a second time, because the device may have no room for it. Digests show that
the base's frozen tensors are unchanged, and the saved adapter is added next to the trained one. If
initialization or training changed the base, a newly loaded base replaces the model on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.methods import METHODS
from ftlevel.models.hardware import evaluating
from ftlevel.models.upstream.shards import local_shard
from ftlevel.objectives import Objective
from ftlevel.trained.adapt import add_adapter, load_adapter
from ftlevel.training.gradients import GradientMonitor
from ftlevel.training.model import (
    PreparedModel,
    TensorHash,
    base_name,
    hash_tensor,
    hash_tensors,
    load_base,
)
from ftlevel.training.plan.run import Run

NUM_TEST_ROWS = 4

MAX_TEST_LOGITS = 8_000_000
"""Maximal number of language-head logits that are compared: 32 MB, with four copies in memory."""


@dataclass(frozen=True)
class Proof:
    """Result of comparing saved and trained model; differences are max |logit difference|.

    Attributes:
        gradient_tensors: number of trainable tensors with a gradient.
        idle_tensors: number of those whose gradient was zero before and after the first update.
        frozen_tensors: number of frozen tensors; all are bit for bit as loaded.
        reload_difference: difference between the logits of the saved and of the trained model.
        adapter_effect: difference between the logits before and after training.
        skipped_steps: steps skipped because float16 overflowed.
    """

    gradient_tensors: int
    idle_tensors: int
    frozen_tensors: int
    reload_difference: float
    adapter_effect: float
    probe_rows: int
    skipped_steps: int = 0


def verify_run(
    model: PreparedModel,
    run: Run,
    output_dir: RunDirectory,
    gradients: GradientMonitor,
    why_no_effect: str,
) -> Proof:
    """Compare the files saved in `output_dir` with the trained model.

    Raises RunError if they differ, or if training changed nothing; `why_no_effect`, a known cause
    of the latter, is added to the message.
    """
    inputs = create_check_inputs(run)
    result = check_saved(
        model.model,
        output_dir.adapter,
        model.digests,
        lambda: load_base(run),
        inputs,
        is_base_modified=METHODS[run.config.method.kind].initialization.rewrites_base(
            run.config.method
        ),
        why_no_effect=why_no_effect,
    )
    return create_proof(result, inputs, gradients)


def create_proof(result: CheckResult, inputs: CheckInputs, gradients: GradientMonitor) -> Proof:
    """Returns the proof, from the comparison `result` and the gradients seen in training."""
    return Proof(
        gradients.checked,
        len(gradients.idle),
        *result,
        len(inputs.batch["input_ids"]),
        gradients.skipped,
    )


def create_check_inputs(run: Run) -> CheckInputs:
    """Returns the batch and settings with which two models are compared."""
    model_info, rows = run.model, run.data.validation or run.data.train
    batch = collate_check_batch(
        rows, model_info.pad_id, model_info.device, run.objective, model_info.vocabulary
    )
    return CheckInputs(batch, run.objective, model_info.device, model_info.dtype)


def collate_check_batch(
    rows: Sequence[Encoded], pad_id: int, device: str, objective: Objective, vocab_size: int
) -> dict[str, Tensor]:
    """Returns a batch of rows of medium length, on which logits are compared.

    For token objectives, rows are truncated so that there are at most `MAX_TEST_LOGITS` logits.
    """
    sequences = (sequence for row in rows for sequence in row.sequences)
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
    middle = len(ordered) // 2
    selected = ordered[max(0, middle - NUM_TEST_ROWS // 2) :][:NUM_TEST_ROWS]
    if objective.predicts_tokens:
        max_positions = max(1, MAX_TEST_LOGITS // (vocab_size * len(selected)))
        selected = [_truncate(row, max_positions, objective) for row in selected]
    return {name: value.to(device) for name, value in Collator(pad_id)(selected).items()}


def _truncate(row: Encoded, max_positions: int, objective: Objective) -> Encoded:
    labels = row.labels[:max_positions] if isinstance(row.labels, list) else row.labels
    if objective.feeds_labels:  # the decoder has one position per label
        return replace(row, labels=labels)
    extras = {name: values[:max_positions] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:max_positions], labels=labels, extras=extras)


@dataclass(frozen=True)
class CheckInputs:
    """Batch, objective, device and compute dtype with which two models are compared."""

    batch: dict[str, Tensor]
    objective: Objective
    device: str
    dtype: str

    def logits(self, model: Any) -> Tensor:
        """Returns the logits of `model` in eval mode, in float32 on the CPU."""
        inputs, _ = self.objective.split(self.batch)
        with evaluating(model, self.device, self.dtype):
            return self.objective.logits(model(**inputs)).float().cpu()


CheckResult = tuple[int, float, float]
"""Number of compared frozen tensors, largest difference after reloading, largest effect of
training."""


def check_saved(
    trained: Any,
    path: Path,
    digests: Mapping[str, TensorHash],
    load_base: Callable[[], Any],
    inputs: CheckInputs,
    *,
    is_base_modified: bool = False,
    why_no_effect: str = "",
) -> CheckResult:
    """Load the files at `path` onto the base and compare the logits with those of `trained`.

    `digests` are hashes of the base's tensors by name, `load_base` loads the base again.
    `is_base_modified` means that the method's initialization changed the base weights. Raises
    RunError if frozen weights or the reloaded logits differ, or training changed nothing.
    """
    frozen = compare_frozen(trained, digests, is_base_modified=is_base_modified)
    after = inputs.logits(trained)
    logits = None
    if hasattr(trained, "peft_config") and not is_base_modified:
        logits = _compute_on_same_base(trained, path, inputs)
    if logits is None:
        logits = _compute_on_new_base(trained, path, load_base, inputs)
    before, saved_logits = logits
    max_diff = (saved_logits - after).abs().max().item()
    effect = (after - before).abs().max().item()
    check_logits(path, max_diff, effect, bound_of(after, inputs), why_no_effect)
    return frozen, max_diff, effect


def bound_of(logits: Tensor, inputs: CheckInputs) -> float:
    """Returns the maximum by which logits of the reloaded model may differ from `logits`."""
    return logits.abs().max().item() * (1e-5 if inputs.dtype == "float32" else 1e-2)


def check_logits(
    path: Path, max_diff: float, effect: float, bound: float, why_no_effect: str = ""
) -> None:
    """Raise RunError if `max_diff` exceeds `bound` or is NaN, or if `effect` is zero.

    `max_diff` is the logit difference of saved and trained, `effect` of trained and initial model.
    """
    if not max_diff <= bound:  # also NaN
        raise RunError(
            f"the adapter saved in {path} differs from the trained one: its logits differ "
            f"by {max_diff:.3g} (bound {bound:.3g}). It is kept for inspection; do not use it. "
            f"Please report this with the command."
        )
    if effect == 0:
        raise RunError(
            f"training had no effect: logits with and without the trained weights are equal. Do "
            f"not use {path}. {why_no_effect or 'Train longer, or raise --learning-rate.'}"
        )


LogitsPair = tuple[Tensor, Tensor]
"""Logits of the base without the trained tensors, and with the saved ones."""

_ADAPTER_NAME = "saved"


def _compute_on_same_base(trained: Any, path: Path, inputs: CheckInputs) -> LogitsPair | None:
    """Returns logits of `trained` without adapter and with the saved one; None if unsupported."""
    name, flags = trained.active_adapter, [p.requires_grad for p in trained.parameters()]
    with trained.disable_adapter():
        before = inputs.logits(trained)
    try:
        add_adapter(trained, path, _ADAPTER_NAME)
        trained.set_adapter(_ADAPTER_NAME)
        return before, inputs.logits(trained)
    except InputError:  # only one of its kind is allowed, or it is corrupted: use a fresh base
        return None
    finally:
        trained.set_adapter(name)
        if _ADAPTER_NAME in trained.peft_config:
            trained.delete_adapter(_ADAPTER_NAME)
        for parameter, flag in zip(trained.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _compute_on_new_base(
    trained: Any, path: Path, load_base: Callable[[], Any], inputs: CheckInputs
) -> LogitsPair:
    """Returns the logits of a newly loaded base, without and with the saved files applied."""
    with _offload_model(trained, inputs.device):
        base = load_base()
        if hasattr(trained, "peft_config"):
            model = load_adapter(base, path)
            with model.disable_adapter():
                before = inputs.logits(model)
        else:
            before = inputs.logits(base)
            del base
            model = (
                type(trained)
                .from_pretrained(path, dtype=torch.float32, use_safetensors=True, use_kernels=False)
                .to(inputs.device)
            )
        return before, inputs.logits(model)


@contextlib.contextmanager
def _offload_model(model: Any, device: str) -> Iterator[None]:
    original_device = next(model.parameters()).device
    if device != "cpu":
        model.to("cpu")
    try:
        yield
    finally:
        if device != "cpu":
            model.to(original_device)


def compare_frozen(
    trained: Any, expected: Mapping[str, TensorHash], *, is_base_modified: bool = False
) -> int:
    """Raise RunError if frozen tensors differ from the `expected` hashes; returns their number."""
    frozen = [(base_name(name), p) for name, p in trained.named_parameters() if not p.requires_grad]
    base_tensors = [(name, tensor) for name, tensor in frozen if name in expected]
    digests = hash_tensors(base_tensors)
    names = [
        name
        for name, tensor in base_tensors
        if digests[name] != expected[name] and not _is_only_cast(tensor, expected[name])
    ]
    # PEFT never uses a head's frozen original, which is random if the checkpoint has no head.
    names = [name for name in names if not _is_replaced(trained, name)]
    if is_base_modified:  # base weights without the initialization
        names = [name for name in names if not _is_wrapped(trained, name)]
    if names:
        raise RunError(
            f"{len(names):,} frozen tensors changed while training: {join_names(names, 3)}. "
            "The run cannot be trusted; please report it with the command."
        )
    return len(base_tensors)


def _is_only_cast(tensor: Tensor, expected: TensorHash) -> bool:
    """Returns whether `tensor` differs from `expected` by dtype only (Switch casts its routers)."""
    if tensor.dtype == expected.dtype or not tensor.is_floating_point():
        return False
    tensor = local_shard(tensor.detach())
    former = tensor.to(expected.dtype)
    return hash_tensor(former) == expected and torch.equal(former.to(tensor.dtype), tensor)


def _is_replaced(trained: Any, name: str) -> bool:
    configs = getattr(trained, "peft_config", {})
    heads = next(iter(configs.values())).modules_to_save or [] if configs else []
    return any(name.startswith(head + ".") or f".{head}." in name for head in heads)


def _is_wrapped(trained: Any, name: str) -> bool:
    return hasattr(trained.get_base_model().get_submodule(name.rpartition(".")[0]), "base_layer")
