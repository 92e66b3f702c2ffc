"""The models that a run asks before its first step and does not train, found before any loads."""

from __future__ import annotations

from pathlib import Path

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.trained.another import Another, find_another
from ftlevel.training.plan.plan import Beside, PlannedModel


def find_beside(config: TrainConfig, model: PlannedModel) -> Beside:
    """Return the models that `config` names beside the one that is trained.

    Raises:
        ConfigError: one is what the run would write over.
        InputError: one is not there, or cannot be asked about the rows.
    """
    return Beside(
        reference=_find(config, model, "--reference", config.preference.other_reference),
        teacher=_find(config, model, "--teacher", config.distillation.teacher),
    )


def _find(config: TrainConfig, model: PlannedModel, flag: str, name: str | None) -> Another | None:
    if name is None:
        return None
    path, out = Path(name).expanduser(), config.output.dir
    if out is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--output-dir {out} holds {flag} {name}, which stays as it is. Name another directory."
        )
    found = find_another(flag, name, model.kind, model.tokenizer, model.device)
    return found.in_precision(model.dtype)
