"""Proof that what was saved is what was trained: reload it onto the same base and compare.

The base is not loaded a second time beside the model that was trained, which a device that just
held the training could not hold. Its frozen tensors are shown to be those that were loaded, by
their digests; the saved adapter is put onto it beside the trained one. Where the base is not itself
any more (a start was taken out of it, or it was trained), a fresh one takes the model's place on
the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import InputError, RunError, listing
from ftlevel.methods import METHODS
from ftlevel.models.hardware import autocast
from ftlevel.models.upstream.shards import own_part
from ftlevel.task import Objective, TokenObjective
from ftlevel.trained.adapt import add_adapter, load_adapter
from ftlevel.training.callbacks.gradients import GradientProof
from ftlevel.training.model import Adapted, Digest, base_name, digest, digest_tensors, load_base
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
        frozen_tensors: how many frozen tensors are bit for bit those that were loaded.
        reload_difference: largest |logit| difference between the trained and the reloaded model.
        adapter_effect: largest |logit| difference that the training made.
        probe_rows: how many rows were compared.
        skipped_steps: how many steps float16 skipped because they overflowed.
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
    """The base before anything was done to it.

    Attributes:
        digests: of its tensors, by their names in it.
        load: loads it anew.
    """

    digests: Mapping[str, Digest]
    load: Callable[[], Any]


def prove(
    adapted: Adapted, config: TrainConfig, plan: Plan, run: RunDirectory, gradients: GradientProof
) -> Proof:
    """Compare what `run` has saved with the model of `adapted`, as it was trained.

    Raises:
        RunError: it is not what was trained, or nothing was.
    """
    probe = build_probe(plan)
    found = check_saved(
        adapted.model,
        run.adapter,
        Origin(adapted.digests, lambda: load_base(config, plan.model)),
        probe,
        rewritten=METHODS[config.method.kind].rewrites_base(config.method),
    )
    return describe_proof(found, probe, gradients)


def describe_proof(found: Found, probe: Probe, gradients: GradientProof) -> Proof:
    """Return what is told of a saved run that was compared with what was trained."""
    return Proof(
        gradients.checked, len(gradients.idle), *found, len(probe.batch["input_ids"]),
        gradients.skipped,
    )  # fmt: skip


def build_probe(plan: Plan) -> Probe:
    """Return what the models of a run are compared on."""
    planned, rows = plan.model, plan.data.validation or plan.data.train
    batch = probe_batch(rows, planned.pad_id, planned.device, plan.objective, planned.vocabulary)
    return Probe(batch, plan.objective, planned.device, planned.dtype)


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


Found = tuple[int, float, float]
"""Frozen tensors compared, largest difference after reloading, largest effect of training."""


def check_saved(
    trained: Any, directory: Path, origin: Origin, probe: Probe, *, rewritten: bool = False
) -> Found:
    """Load what was saved in `directory` onto the base and compare it with `trained`.

    Args:
        trained: the model as it was trained; left as it is.
        directory: the saved adapter, or the whole model of `--method full`.
        origin: the base that it was put onto.
        probe: what to compare logits on.
        rewritten: whether the method took its start out of the weights under its updates.

    Raises:
        RunError: frozen weights changed, the reloaded model differs, or training changed nothing.
    """
    frozen = compare_frozen(trained, origin.digests, rewritten=rewritten)
    after = probe.logits(trained)
    found = None
    if hasattr(trained, "peft_config") and not rewritten:
        found = _on_the_same_base(trained, directory, probe)
    if found is None:
        found = _on_a_fresh_base(trained, directory, origin.load, probe)
    before, again = found
    difference = (again - after).abs().max().item()
    effect = (after - before).abs().max().item()
    check_differences(directory, difference, effect, bound_of(after, probe))
    return frozen, difference, effect


def bound_of(logits: torch.Tensor, probe: Probe) -> float:
    """Return how far the logits of a model that was saved may be from those of the trained one."""
    return logits.abs().max().item() * (1e-5 if probe.dtype == "float32" else 1e-2)


def check_differences(directory: Path, difference: float, effect: float, bound: float) -> None:
    """Refuse what was saved in `directory` where it is not what was trained.

    Args:
        directory: the saved adapter or model.
        difference: of its logits from those of the trained one.
        effect: of training on the logits.
        bound: of the difference.

    Raises:
        RunError: it is not, or training changed nothing.
    """
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


Compared = tuple[torch.Tensor, torch.Tensor]
"""Logits of the base without what was trained, and with what was saved."""

_SAVED = "saved"


def _on_the_same_base(trained: Any, directory: Path, probe: Probe) -> Compared | None:
    """Put the saved adapter beside the trained one; None where they cannot stand together."""
    name, flags = trained.active_adapter, [p.requires_grad for p in trained.parameters()]
    with disabled_adapter(trained):
        before = probe.logits(trained)
    try:
        add_adapter(trained, directory, _SAVED)
        trained.set_adapter(_SAVED)
        return before, probe.logits(trained)
    except InputError:  # of its kind a model has one; or it is damaged, which a fresh base tells
        return None
    finally:
        trained.set_adapter(name)
        if _SAVED in trained.peft_config:
            trained.delete_adapter(_SAVED)
        for parameter, flag in zip(trained.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _on_a_fresh_base(
    trained: Any, directory: Path, load_base: Callable[[], Any], probe: Probe
) -> Compared:
    """Load the base anew, with `trained` out of the device's memory meanwhile."""
    with _on_the_cpu(trained, probe.device):
        fresh = load_base()
        if hasattr(trained, "peft_config"):
            reloaded = load_adapter(fresh, directory)
            with disabled_adapter(reloaded):
                before = probe.logits(reloaded)
        else:
            before = probe.logits(fresh)
            del fresh
            reloaded = type(trained).from_pretrained(
                directory, dtype=torch.float32, use_safetensors=True
            ).to(probe.device)  # fmt: skip
        return before, probe.logits(reloaded)


@contextlib.contextmanager
def _on_the_cpu(model: Any, device: str) -> Iterator[None]:
    """Hold `model` (mutated) in the host's memory inside the block, if it is not there anyway."""
    place = next(model.parameters()).device
    if device != "cpu":
        model.to("cpu")
    try:
        yield
    finally:
        if device != "cpu":
            model.to(place)


def compare_frozen(trained: Any, expected: Mapping[str, Digest], *, rewritten: bool = False) -> int:
    """Return how many frozen tensors of `trained` are those of the base, by its digests.

    Raises:
        RunError: one is not.
    """
    frozen = [(base_name(name), p) for name, p in trained.named_parameters() if not p.requires_grad]
    known = [(name, tensor) for name, tensor in frozen if name in expected]
    found = digest_tensors(known)
    changed = [
        name
        for name, tensor in known
        if found[name] != expected[name] and not _is_only_cast(tensor, expected[name])
    ]
    # A head's frozen original is random where the checkpoint has no head; it is never used.
    changed = [name for name in changed if not _is_replaced(trained, name)]
    if rewritten:  # the weights under its updates are those without the start
        changed = [name for name in changed if not _is_adapted(trained, name)]
    if changed:
        raise RunError(
            f"{len(changed):,} frozen tensors changed while training: {listing(changed, 3)}. "
            "The run cannot be trusted; please report it with the command."
        )
    return len(known)


def _is_only_cast(tensor: torch.Tensor, expected: Digest) -> bool:
    """Whether the numbers are equal and the precision is another.

    A forward pass may cast a weight, as Switch Transformers does its router.
    """
    if tensor.dtype == expected.dtype or not tensor.is_floating_point():
        return False
    tensor = own_part(tensor.detach())
    former = tensor.to(expected.dtype)
    return digest(former) == expected and torch.equal(former.to(tensor.dtype), tensor)


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
