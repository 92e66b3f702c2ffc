"""Proof that what was saved is what was trained: reload it into a fresh base and compare."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import RunError, listing
from ftlevel.methods import METHODS
from ftlevel.models.hardware import autocast
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.task import Objective, TokenObjective
from ftlevel.trained.adapt import load_adapter
from ftlevel.training.callbacks.gradient_proof import GradientProof
from ftlevel.training.model import load_base
from ftlevel.training.plan.plan import Plan

PROBE_ROWS = 4

PROBE_SCORES = 8_000_000
"""Most scores of a language head that are compared: 32 MB, of which four are held at once."""


@dataclass(frozen=True)
class Proof:
    """What the check of a saved run found.

    Attributes:
        gradient_tensors: how many tensors had a gradient at the first step.
        idle_tensors: how many had a zero gradient in the first two steps.
        frozen_tensors: how many frozen tensors are bit for bit those of a fresh base.
        reload_difference: largest |logit| difference between the trained and the reloaded model.
        adapter_effect: largest |logit| difference that the training made.
        probe_rows: how many rows were compared.
    """

    gradient_tensors: int
    idle_tensors: int
    frozen_tensors: int
    reload_difference: float
    adapter_effect: float
    probe_rows: int


def prove(
    model: Any, config: TrainConfig, plan: Plan, run: RunDirectory, gradients: GradientProof
) -> Proof:
    """Compare what `run` has saved with `model`, as it was trained.

    Raises:
        RunError: it is not what was trained, or nothing was.
    """
    planned, rows = plan.model, plan.data.validation or plan.data.train
    batch = probe_batch(rows, planned.pad_id, planned.device, plan.objective, planned.vocabulary)
    frozen, difference, effect = check_saved(
        model,
        run.adapter,
        lambda: load_base(config, planned),
        Probe(batch, plan.objective, planned.device, planned.dtype),
        rewritten=METHODS[config.method.kind].rewrites_base(config.method),
    )
    return Proof(
        gradients.checked, len(gradients.idle), frozen, difference, effect,
        len(batch["input_ids"]),
    )  # fmt: skip


def probe_batch(
    rows: Sequence[Encoded], pad_id: int, device: str, objective: Objective, vocabulary: int
) -> dict[str, torch.Tensor]:
    """Return a batch of rows of a middling length, to compare logits on.

    Args:
        rows: encoded rows.
        pad_id: fills the batch.
        device: torch device type.
        objective: what is trained for; what scores a vocabulary gets the beginnings of rows.
        vocabulary: how many tokens a language head scores.
    """
    branches = (branch for row in rows for branch in row.branches)
    chosen = sorted(branches, key=lambda branch: len(branch.input_ids))
    middle = len(chosen) // 2
    picked = chosen[max(0, middle - PROBE_ROWS // 2) :][:PROBE_ROWS]
    if isinstance(objective, TokenObjective):
        most = max(1, PROBE_SCORES // (vocabulary * len(picked)))
        picked = [_shorten(row, most, objective) for row in picked]
    return {name: value.to(device) for name, value in Collator(pad_id)(picked).items()}


def _shorten(row: Encoded, most: int, objective: TokenObjective) -> Encoded:
    """Return the beginning of `row` with at most `most` scored positions."""
    labels = row.labels[:most] if isinstance(row.labels, list) else row.labels
    if objective.feeds_labels:  # the decoder's positions are the labels'
        return replace(row, labels=labels)
    extras = {name: values[:most] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:most], labels=labels, extras=extras)


@dataclass(frozen=True)
class Probe:
    """What two models are compared on.

    Attributes:
        batch: rows, on the device.
        objective: what was trained for.
        device: torch device type.
        dtype: compute precision's name.
    """

    batch: dict[str, torch.Tensor]
    objective: Objective
    device: str
    dtype: str

    def logits(self, model: Any) -> torch.Tensor:
        """Return `model`'s logits in eval mode, in float32 on the CPU."""
        inputs, _ = self.objective.split(self.batch)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                return self.objective.logits(model(**inputs)).float().cpu()
        finally:
            model.train(training)


def digest_frozen(model: Any) -> dict[str, str]:
    """Return the SHA-256 of each frozen tensor of `model`, by its name in the base."""
    return {
        _base_name(name): _digest(tensor)
        for name, tensor in model.named_parameters()
        if not tensor.requires_grad
    }


def _base_name(name: str) -> str:
    """Undo what PEFT adds to a parameter's name."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach()
    if parts := inner_tensors(data):  # torchao's: several tensors under one name
        return hashlib.sha256(" ".join(map(_digest, parts)).encode()).hexdigest()
    plain = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def check_saved(
    trained: Any,
    directory: Path,
    load_base: Callable[[], Any],
    probe: Probe,
    *,
    rewritten: bool = False,
) -> tuple[int, float, float]:
    """Load what was saved in `directory` into a fresh base and compare it with `trained`.

    Args:
        trained: the model as it was trained.
        directory: the saved adapter, or the whole model of `--method full`.
        load_base: loads the base anew.
        probe: what to compare logits on.
        rewritten: whether the method took its start out of the weights under its updates.

    Returns:
        Frozen tensors compared, largest difference after reloading, largest effect of training.

    Raises:
        RunError: frozen weights changed, the reloaded model differs, or training changed nothing.
    """
    after = probe.logits(trained)
    fresh = load_base()
    frozen = _compare_frozen(trained, fresh, rewritten=rewritten)
    if hasattr(trained, "peft_config"):
        reloaded = load_adapter(fresh, directory)
        with disabled_adapter(reloaded):
            before = probe.logits(reloaded)
    else:
        before = probe.logits(fresh)
        reloaded = type(trained).from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True
        ).to(probe.device)  # fmt: skip
    difference = (probe.logits(reloaded) - after).abs().max().item()
    effect = (after - before).abs().max().item()
    bound = after.abs().max().item() * (1e-5 if probe.dtype == "float32" else 1e-2)
    if not difference <= bound:
        raise RunError(
            f"the adapter saved in {directory} is not the one that was trained: its logits differ "
            f"by {difference:.3g} (bound {bound:.3g}). It is kept for inspection and must not be "
            "used. Please report this with the command."
        )
    if effect == 0:
        raise RunError(
            f"training changed nothing: with and without what was trained the logits are equal. "
            f"{directory} is of no use. Train longer, or raise --learning-rate."
        )
    return frozen, difference, effect


def _compare_frozen(trained: Any, fresh: Any, *, rewritten: bool = False) -> int:
    """Return how many frozen tensors of `trained` equal those of `fresh`; raise if one does not."""
    expected = {name: _digest(tensor) for name, tensor in fresh.named_parameters()}
    found = digest_frozen(trained)
    changed = [n for n, digest in found.items() if n in expected and expected[n] != digest]
    if changed:  # a forward pass may cast a weight, as Switch Transformers does its router
        changed = sorted(set(changed) - _only_cast(trained, fresh))
    # A head's frozen original is random where the checkpoint has no head; it is never used.
    changed = [name for name in changed if not _is_replaced(trained, name)]
    if rewritten:  # the weights under its updates are those without the start
        changed = [name for name in changed if not _is_adapted(trained, name)]
    if changed:
        raise RunError(
            f"{len(changed):,} frozen tensors changed while training: {listing(changed, 3)}. "
            "The run cannot be trusted; please report it with the command."
        )
    return sum(name in expected for name in found)


def _only_cast(trained: Any, fresh: Any) -> set[str]:
    """Return the frozen tensors whose numbers are equal and whose precision is another."""
    before = dict(fresh.named_parameters())
    pairs = (
        (name, before.get(name), tensor.detach())
        for full, tensor in trained.named_parameters()
        if not tensor.requires_grad and (name := _base_name(full))
    )
    return {
        name
        for name, old, new in pairs
        if old is not None and old.dtype != new.dtype and old.is_floating_point()
        and new.is_floating_point() and torch.equal(old.double(), new.double())
    }  # fmt: skip


def _is_replaced(trained: Any, name: str) -> bool:
    configs = getattr(trained, "peft_config", {})
    heads = next(iter(configs.values())).modules_to_save or [] if configs else []
    return any(name.startswith(head + ".") or f".{head}." in name for head in heads)


def _is_adapted(trained: Any, name: str) -> bool:
    module = trained.get_base_model().get_submodule(name.rpartition(".")[0])
    return hasattr(module, "base_layer")


@contextlib.contextmanager
def disabled_adapter(model: Any) -> Any:
    """Switch a PEFT model's adapter off inside the block."""
    with model.disable_adapter():
        yield
