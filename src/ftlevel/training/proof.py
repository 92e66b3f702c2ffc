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
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.methods import METHODS
from ftlevel.models.hardware import evaluating
from ftlevel.models.upstream.shards import local_shard
from ftlevel.objectives import Objective, TokenObjective
from ftlevel.trained.adapt import add_adapter, load_adapter
from ftlevel.training.gradients import GradientMonitor
from ftlevel.training.model import (
    Digest,
    PreparedModel,
    base_name,
    digest,
    digest_tensors,
    load_base,
)
from ftlevel.training.plan.run import Run

PROBE_ROWS = 4

PROBE_SCORES = 8_000_000
"""Maximal number of language-head logits that are compared: 32 MB, with four copies in memory."""


@dataclass(frozen=True)
class Proof:
    """Result of checking a saved run; differences of logits are maximum absolute ones.

    Attributes:
        idle_tensors: number of tensors with a zero gradient in the first two steps.
        frozen_tensors: number of frozen tensors; all are bit for bit as loaded.
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


@dataclass(frozen=True)
class Origin:
    """The base as first loaded: digests of its tensors by name, and a function to load it again."""

    digests: Mapping[str, Digest]
    load: Callable[[], Any]


def prove(
    adapted: PreparedModel, run: Run, directory: RunDirectory, gradients: GradientMonitor
) -> Proof:
    """Compare the files saved in `run` with the trained model.

    Raises:
        RunError: they differ, or training changed nothing.
    """
    probe = build_probe(run)
    comparison = check_saved(
        adapted.model,
        directory.adapter,
        Origin(adapted.digests, lambda: load_base(run)),
        probe,
        rewritten=METHODS[run.config.method.kind].initialization.rewrites_base(run.config.method),
    )
    return describe_proof(comparison, probe, gradients)


def describe_proof(comparison: Found, probe: Probe, gradients: GradientMonitor) -> Proof:
    """Returns the proof of a saved run, given the comparison and the gradients seen in training."""
    return Proof(
        gradients.checked,
        len(gradients.idle),
        *comparison,
        len(probe.batch["input_ids"]),
        gradients.skipped,
    )


def build_probe(run: Run) -> Probe:
    """Build the batch and settings with which the trained and the reloaded model are compared."""
    planned, rows = run.model, run.data.validation or run.data.train
    batch = probe_batch(rows, planned.pad_id, planned.device, run.objective, planned.vocabulary)
    return Probe(batch, run.objective, planned.device, planned.dtype)


def probe_batch(
    rows: Sequence[Encoded], pad_id: int, device: str, objective: Objective, vocabulary: int
) -> dict[str, Tensor]:
    """Returns a batch of rows of medium length, on which logits are compared.

    For token objectives, rows are truncated so that the batch has at most `PROBE_SCORES` logits:
    `vocabulary` per position.
    """
    sequences = (sequence for row in rows for sequence in row.sequences)
    by_length = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
    middle = len(by_length) // 2
    selected = by_length[max(0, middle - PROBE_ROWS // 2) :][:PROBE_ROWS]
    if isinstance(objective, TokenObjective):
        max_positions = max(1, PROBE_SCORES // (vocabulary * len(selected)))
        selected = [_shorten(row, max_positions, objective) for row in selected]
    return {name: value.to(device) for name, value in Collator(pad_id)(selected).items()}


def _shorten(row: Encoded, max_positions: int, objective: TokenObjective) -> Encoded:
    """Returns the beginning of `row` with at most `max_positions` positions that have logits."""
    labels = row.labels[:max_positions] if isinstance(row.labels, list) else row.labels
    if objective.feeds_labels:  # the decoder has one position per label
        return replace(row, labels=labels)
    extras = {name: values[:max_positions] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:max_positions], labels=labels, extras=extras)


@dataclass(frozen=True)
class Probe:
    """The batch, objective, device and compute dtype that two models are compared with."""

    batch: dict[str, Tensor]
    objective: Objective
    device: str
    dtype: str

    def logits(self, model: Any) -> Tensor:
        """Returns `model`'s logits in eval mode, in float32 on the CPU."""
        inputs, _ = self.objective.split(self.batch)
        with evaluating(model, self.device, self.dtype):
            return self.objective.logits(model(**inputs)).float().cpu()


Found = tuple[int, float, float]
"""Number of compared frozen tensors, largest difference after reloading, largest effect of
training."""


def check_saved(
    trained: Any, directory: Path, origin: Origin, probe: Probe, *, rewritten: bool = False
) -> Found:
    """Load the files in `directory` onto the base and compare the result with `trained`.

    `trained` is left unchanged. `rewritten` means that the method's initialization changed the base
    weights. Raises RunError if frozen weights or the reloaded logits differ, or training changed
    nothing.
    """
    frozen = compare_frozen(trained, origin.digests, rewritten=rewritten)
    after = probe.logits(trained)
    logits = None
    if hasattr(trained, "peft_config") and not rewritten:
        logits = _compare_on_same_base(trained, directory, probe)
    if logits is None:
        logits = _compare_on_fresh_base(trained, directory, origin.load, probe)
    before, again = logits
    difference = (again - after).abs().max().item()
    effect = (after - before).abs().max().item()
    check_differences(directory, difference, effect, bound_of(after, probe))
    return frozen, difference, effect


def bound_of(logits: Tensor, probe: Probe) -> float:
    """Returns the largest allowed difference of the saved model's logits from `logits`."""
    return logits.abs().max().item() * (1e-5 if probe.dtype == "float32" else 1e-2)


def check_differences(directory: Path, difference: float, effect: float, bound: float) -> None:
    """Raise RunError if `difference` exceeds `bound`, or if the `effect` of training is zero.

    Both are largest absolute differences of logits. `difference` is between saved and trained
    model, `effect` between the model before and after training.
    """
    if not difference <= bound:  # also NaN
        raise RunError(
            f"the adapter saved in {directory} differs from the trained one: its logits differ "
            f"by {difference:.3g} (bound {bound:.3g}). It is kept for inspection; do not use it. "
            f"Please report this with the command."
        )
    if effect == 0:
        raise RunError(
            f"training had no effect: logits with and without the trained weights are equal. Do "
            f"not use {directory}. Train longer, or raise --learning-rate."
        )


Compared = tuple[Tensor, Tensor]
"""Logits of the base without the trained tensors, and with the saved ones."""

_SAVED = "saved"


def _compare_on_same_base(trained: Any, directory: Path, probe: Probe) -> Compared | None:
    """Returns the logits without adapter and with the saved adapter; None if PEFT cannot add it."""
    name, flags = trained.active_adapter, [p.requires_grad for p in trained.parameters()]
    with trained.disable_adapter():
        before = probe.logits(trained)
    try:
        add_adapter(trained, directory, _SAVED)
        trained.set_adapter(_SAVED)
        return before, probe.logits(trained)
    except InputError:  # only one of its kind is allowed, or it is corrupted: use a fresh base
        return None
    finally:
        trained.set_adapter(name)
        if _SAVED in trained.peft_config:
            trained.delete_adapter(_SAVED)
        for parameter, flag in zip(trained.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _compare_on_fresh_base(
    trained: Any, directory: Path, load_base: Callable[[], Any], probe: Probe
) -> Compared:
    """Returns the logits of a newly loaded base, without and with the saved files applied."""
    with _moved_to_cpu(trained, probe.device):
        fresh = load_base()
        if hasattr(trained, "peft_config"):
            reloaded = load_adapter(fresh, directory)
            with reloaded.disable_adapter():
                before = probe.logits(reloaded)
        else:
            before = probe.logits(fresh)
            del fresh
            reloaded = (
                type(trained)
                .from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
                .to(probe.device)
            )
        return before, probe.logits(reloaded)


@contextlib.contextmanager
def _moved_to_cpu(model: Any, device: str) -> Iterator[None]:
    """Move `model` (modified) to host memory inside the `with` block, then back to `device`."""
    original_device = next(model.parameters()).device
    if device != "cpu":
        model.to("cpu")
    try:
        yield
    finally:
        if device != "cpu":
            model.to(original_device)


def compare_frozen(trained: Any, expected: Mapping[str, Digest], *, rewritten: bool = False) -> int:
    """Check that the frozen tensors of `trained` have the base's digests; returns their number.

    Raises:
        RunError: a tensor changed.
    """
    frozen = [(base_name(name), p) for name, p in trained.named_parameters() if not p.requires_grad]
    base_tensors = [(name, tensor) for name, tensor in frozen if name in expected]
    digests = digest_tensors(base_tensors)
    changed = [
        name
        for name, tensor in base_tensors
        if digests[name] != expected[name] and not _is_only_cast(tensor, expected[name])
    ]
    # PEFT never uses a head's frozen original, which is random if the checkpoint has no head.
    changed = [name for name in changed if not _is_replaced(trained, name)]
    if rewritten:  # base weights without the initialization
        changed = [name for name in changed if not _is_adapted(trained, name)]
    if changed:
        raise RunError(
            f"{len(changed):,} frozen tensors changed while training: {join_names(changed, 3)}. "
            "The run cannot be trusted; please report it with the command."
        )
    return len(base_tensors)


def _is_only_cast(tensor: Tensor, expected: Digest) -> bool:
    """Whether only the dtype differs; Switch Transformers casts its router in the forward pass."""
    if tensor.dtype == expected.dtype or not tensor.is_floating_point():
        return False
    tensor = local_shard(tensor.detach())
    former = tensor.to(expected.dtype)
    return digest(former) == expected and torch.equal(former.to(tensor.dtype), tensor)


def _is_replaced(trained: Any, name: str) -> bool:
    configs = getattr(trained, "peft_config", {})
    heads = next(iter(configs.values())).modules_to_save or [] if configs else []
    return any(name.startswith(head + ".") or f".{head}." in name for head in heads)


def _is_adapted(trained: Any, name: str) -> bool:
    module = trained.get_base_model().get_submodule(name.rpartition(".")[0])
    return hasattr(module, "base_layer")
