"""What `ftlevel export` asks of a format: a module with `plan_export`, named in `config.export`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftlevel.config import ExportConfig
from ftlevel.config.export import FORMATS
from ftlevel.config.section import Choice
from ftlevel.evaluation.two_models import Agreement
from ftlevel.events import Listener
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.gguf.file import Codes

ChooseCodes = Callable[[str], Codes]
"""Name of a weight of the model → its codes, (out, in)."""


@dataclass(frozen=True)
class Merged:
    """What merging the adapter that is exported gave, and how the weights are rounded.

    Attributes:
        summary: merge's; empty where nothing is merged.
        choose: chooses the codes of the weights; None where they are rounded.
        beside_run: the model as it is read back → how far it is from the run as trained; None where
            that is not measured.
    """

    summary: Mapping[str, Any]
    choose: ChooseCodes | None = None
    beside_run: Callable[[Any], Agreement] | None = None


MergeAdapter = Callable[[Path], Merged]
"""Merges the adapter that is exported into its base, in a directory; a model that is whole is left
where it is."""


class Export(Protocol):
    """What is written, before any weights are read.

    Attributes:
        notes: what the user should know, as sentences without a full stop.
    """

    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102 - as above

    def choices(self, device: Choice) -> Iterable[Choice]:
        """Return the lines for the screen."""

    def dry_run(self) -> dict[str, Any]:
        """Return the summary of what would be written."""

    def write(
        self, place: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Write the files of `ExportConfig.outputs` into the directory `place`; return the summary.

        Raises:
            RunError: what was written is not the model.
        """

    def describe(self, summary: Mapping[str, Any]) -> Iterable[str]:
        """Return what came out, a line each."""


def plan_export(config: ExportConfig, found: ModelRef | Mapping[str, ModelRef]) -> Export:
    """Return what will be written in the format that `config` names.

    Args:
        config: what was asked for.
        found: a run, an adapter or a model; or adapters by name, for a format with `several`.

    Raises:
        InputError: the format cannot hold the model.
    """
    module = importlib.import_module(FORMATS[config.format].module)
    planned: Export = module.plan_export(config, found)
    return planned
