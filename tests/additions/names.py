"""Export format of tensor names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.config.section import Choice
from ftlevel.events import Listener
from ftlevel.extras.serving.config import ExportConfig
from ftlevel.extras.serving.formats import MergeAdapter
from ftlevel.models.loading import build_task_model, load_config
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef


def plan_export(config: ExportConfig, ref: ModelRef) -> NamesExport:
    """Plan the export."""
    return NamesExport(config, ref)


@dataclass(frozen=True)
class NamesExport:
    """A list of tensors.

    Attributes:
        config: export configuration.
        ref: the run, adapter or model.
    """

    config: ExportConfig
    ref: ModelRef
    notes: tuple[str, ...] = ()

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yield the choices to print."""
        yield Choice("model", self.config.model)

    def dry_run(self) -> dict[str, Any]:
        """Return the summary of what would be written."""
        return {"format": "names", "tensors": len(self._shapes())}

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Write the list."""
        shapes = self._shapes()
        text = "".join(f"{name} {shape}\n" for name, shape in shapes.items())
        (output / self.config.out.name).write_text(text, encoding="utf-8")
        return {"format": "names", "tensors": len(shapes)}

    def describe(self, summary: Mapping[str, Any]) -> Iterator[str]:
        """Yield the lines to print after the export."""
        yield f"{summary['tensors']:,} tensors"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        config = load_config(self.ref.source)
        kind = TASKS[self.ref.card.task].auto_class("decoder", config.model_type)
        model = build_task_model(config, kind)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
