"""Several adapters of one base become one LoRA, which is then merged like any other.

`cat` puts the A and B of all of them side by side, so that B·A is the weighted sum of the updates,
exactly. The other strategies are PEFT's `add_weighted_adapter`; they only read A and B, so the base
under them is memory that is never filled.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from ftlevel.artifacts.cards import CARD, read_card
from ftlevel.config import MergeConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import ConfigError, InputError
from ftlevel.merging.merge_input import MergeInput, find_adapter
from ftlevel.methods.lora.mixing import (
    mix_exactly,
    mix_with_peft,
    why_not_mixable,
)
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.loading import build_task_model
from ftlevel.trained.vocabulary import why_other_vocabulary
from ftlevel.workspace import Workspace


def mix(
    config: MergeConfig, inputs: MergeInput, stack: contextlib.ExitStack
) -> tuple[MergeInput, list[Choice]]:
    """Return the input whose adapter is the mixture of all of `config`, and what to say of it.

    A single adapter with weight 1 is returned as it is.

    Raises:
        InputError: an adapter cannot be mixed, or was trained on another base.
    """
    weights = config.weights or [1.0] * len(config.adapters)
    if weights == [1.0]:
        return inputs, []
    directories = [find_adapter(name) for name in config.adapters]
    for name, directory in zip(config.adapters, directories, strict=True):
        reason = why_not_mixable(read_peft_config(directory))
        if reason is not None:
            raise InputError(f"{name} cannot be mixed: {reason}.")
        _check_same_base(inputs, name, directory)
    base = build_task_model(inputs.config, inputs.auto_class)
    for name, directory in zip(config.adapters, directories, strict=True):
        other = why_other_vocabulary(base, directory)
        if other is not None:
            raise InputError(f"{name} cannot be mixed: {other}. Merge it alone.")
    mixture = Path(stack.enter_context(Workspace("mixture")))
    if config.strategy == "cat":
        mix_exactly(directories, weights, mixture)
    else:
        _mix_with_peft(config, inputs, directories, weights, mixture)
    shown = ", ".join(f"{w:g} × {n}" for w, n in zip(weights, config.adapters, strict=True))
    exact = "the weighted sum, exactly" if config.strategy == "cat" else "not the weighted sum"
    return replace(inputs, directory=mixture), [
        Choice("mixture", shown, f"--strategy {config.strategy}: {exact}")
    ]


def _mix_with_peft(
    config: MergeConfig,
    inputs: MergeInput,
    directories: list[Path],
    weights: list[float],
    mixture: Path,
) -> None:
    model = build_task_model(inputs.config, inputs.auto_class).to_empty(device="cpu")
    try:
        mix_with_peft(model, directories, weights, mixture, config.strategy, config.density)
    except ValueError as error:
        raise ConfigError(
            f"--strategy {config.strategy}: {str(error).splitlines()[0].rstrip('.')}. "
            "Use --strategy cat, which takes every rank."
        ) from None


def _check_same_base(inputs: MergeInput, name: str, directory: Path) -> None:
    """Refuse an adapter that was trained on other weights than the first one."""
    if not (directory / CARD).is_file():
        return
    own, first = read_card(directory).base, inputs.card.base
    if own.get("fingerprint") != first.get("fingerprint"):
        raise InputError(
            f"{name} was trained on {own.get('name')} and {inputs.directory} on "
            f"{first.get('name')}, whose weights are others. Their updates have no meaning for "
            "each other's base."
        )
