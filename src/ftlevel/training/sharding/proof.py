"""Proof that what was saved is what was trained, where no process has the whole model.

Nothing is gathered: each process compares its part of the base with what it was, and what is whole
in every process with the file that the first one wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.errors import RunError
from ftlevel.models.upstream.shards import own_part, part_of
from ftlevel.trained.adapt import begin_from
from ftlevel.training.callbacks.gradient_proof import GradientProof
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.processes import Processes
from ftlevel.training.proof import (
    Probe,
    Proof,
    bound_of,
    build_probe,
    check_differences,
    compare_frozen,
    describe_proof,
    disabled_adapter,
)


def probe_untrained(adapted: Adapted, plan: Plan) -> torch.Tensor | None:
    """Return the logits of a model before it is trained itself; None where an adapter is.

    Args:
        adapted: sharded; all processes must ask together.
        plan: of the run.
    """
    if hasattr(adapted.model, "peft_config"):
        return None
    return build_probe(plan).logits(adapted.model)


def prove_sharded(
    adapted: Adapted,
    plan: Plan,
    run: RunDirectory,
    gradients: GradientProof,
    processes: Processes,
    untrained: torch.Tensor | None,
) -> Proof:
    """Compare what `run` has saved with the model of `adapted`, as it was trained.

    Args:
        adapted: sharded; all processes must ask together.
        plan: of the run.
        run: its directory.
        gradients: what was seen of them.
        processes: those of the run.
        untrained: what `probe_untrained` gave.

    Raises:
        RunError: in all processes, where one has found that it is not.
    """
    probe, model = build_probe(plan), adapted.model
    frozen = processes.in_all(lambda: compare_frozen(model, adapted.digests))
    after = probe.logits(model)
    if untrained is None:
        with disabled_adapter(model):
            untrained = probe.logits(model)
        difference = float((_reloaded(model, run.adapter, probe, processes) - after).abs().max())
    else:
        difference = processes.in_all(lambda: compare_weights(model, run.adapter))
    effect = float((after - untrained).abs().max())
    bound = bound_of(after, probe)
    processes.in_all(lambda: check_differences(run.adapter, difference, effect, bound))
    return describe_proof((frozen, difference, effect), probe, gradients)


def _reloaded(model: Any, directory: Path, probe: Probe, processes: Processes) -> torch.Tensor:
    """Return the logits of `model` with what was saved in place of what was trained.

    A second adapter beside the trained one would be made from a base that is not whole.
    """
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.zero_()
        processes.in_all(lambda: begin_from(model, directory))
        try:
            return probe.logits(model)
        finally:
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])


def compare_weights(model: Any, directory: Path) -> float:
    """Return the largest difference between this process's part of `model` and what was saved.

    Args:
        model: sharded, of `--method full`.
        directory: the saved model.

    Raises:
        RunError: tensors are missing.
    """
    own = model.state_dict(keep_vars=True)
    difference, seen = 0.0, set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                part = part_of(stored.get_tensor(name), own[name])
                apart = (own_part(own[name]).detach().cpu() - part).abs()
                difference = max(difference, float(apart.max()) if apart.numel() else 0.0)
                seen.add(id(own[name]))
    missing = [name for name, tensor in own.items() if id(tensor) not in seen]
    if missing:
        raise RunError(f"{directory} lacks {missing[0]}, which was trained.")
    return difference
