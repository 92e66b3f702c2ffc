"""Interface of export formats; each module of a format defines `plan_export`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Protocol

from ftlevel.config.section import Choice
from ftlevel.errors import InputError, join_names, with_article
from ftlevel.evaluation.two_models import Agreement
from ftlevel.events import Listener
from ftlevel.extensions import load
from ftlevel.extras.serving.config import FORMATS, SERVERS, ExportConfig, Server
from ftlevel.extras.serving.gguf_file import QuantizedMatrix
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import load_config
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.trained.model_ref import LoadedModel, ModelRef

CodesFunction = Callable[[str], QuantizedMatrix]
"""Function: name of a weight of the model → its quantization codes, `(out, in)`."""


@dataclass(frozen=True)
class MergeOutput:
    """Result of merging the adapter to export; `summary` is empty if there was none.

    `choose` returns a weight's quantization codes; if it is None, weights are rounded. `beside_run`
    compares the logits of a model with those of the run as trained.
    """

    summary: Mapping[str, Any]
    choose: CodesFunction | None = None
    beside_run: Callable[[Any], Agreement] | None = None

    @property
    def facts(self) -> dict[str, Any] | None:
        """Entries of an export's summary about the merge; None if nothing was merged."""
        keys = ("onto", "verified", "agreement")
        return {key: self.summary[key] for key in keys} if self.summary else None


MergeAdapter = Callable[[Path], MergeOutput]
"""Function that merges the adapter to export into its base, and saves the model in a directory.

For a model without an adapter, it saves nothing.
"""


def merge_first(
    ref: ModelRef, output: Path, listener: Listener, merge: MergeAdapter
) -> tuple[MergeOutput, ModelSource]:
    """Merge the adapter of `ref`, if any, in a subdirectory; return result and model to export."""
    merged_dir = output / "merged"
    if ref.directory is None:
        return merge(merged_dir), ref.source
    listener.stage("merging the adapter")
    merged = merge(merged_dir)
    return merged, resolve_source(str(merged_dir))


def stop_notes(name: str, ref: ModelRef, server: str | None) -> list[str]:
    """Returns a note if `server` does not read the stop texts of `ref` from exported files."""
    stop_texts = ref.configured_task.stop_texts
    if not stop_texts or server == "ollama":
        return []
    reader = f"{SERVERS[server].title} does not read" if server else "only Ollama reads"
    return [
        f"{name} was trained with --stop, which {reader} from a model. Send "
        f'"stop": {json.dumps(list(stop_texts))} with each request'
    ]


@dataclass(frozen=True)
class Exporter:
    """What a task changes in exports of whole models; `BaseTask.exporter` names its class.

    `records` is whether `record` is called for a merged model, and `format` how it embeds texts.
    """

    config: ExportConfig
    ref: ModelRef

    records: ClassVar[bool] = False
    format: ClassVar[Any] = None

    @property
    def resolved_config(self) -> ExportConfig:
        """The configuration with the format for models of the task."""
        return self.config

    def check_server(self, server: Server) -> Sequence[str]:
        """Returns notes to print; InputError if `server` does not serve the merged model."""
        config, ref = self.config, self.ref
        task, kind = ref.configured_task, model_kind(load_config(ref.source))
        if (kind if task.generates_text else task.served_as) not in server.merged:
            raise InputError(
                f"{config.model} was trained for {task.name} on {with_article(kind)}, and "
                f"{server.title} serves {_format_served_models(server)}. Keep it with "
                f"transformers: ftlevel merge {quote(config.model)} --out DIR."
            )
        return stop_notes(config.model, ref, config.server)

    def plan_gguf(self) -> Export | None:
        """Returns the plan of a .gguf export; None for that of models that write text."""
        return None

    def record(self, path: Path, model: LoadedModel) -> None:
        """Save outputs of the merged `model`, which a server must return, at `path`."""


def exporter_of(config: ExportConfig, ref: ModelRef) -> Exporter:
    """Returns the exporter of the task of `ref`."""
    exporter: Exporter = load(ref.configured_task.exporter or f"{__name__}:Exporter")(config, ref)
    return exporter


def _format_served_models(server: Server) -> str:
    text = "s that write text"
    names = [f"{name}{text}" if name.endswith("decoder") else name for name in server.merged]
    return join_names([*names, *["embedding models"] * (server.embeddings is not None)])


class Export(Protocol):
    """Protocol of planned exports; weights are not read yet. `notes` are without a period."""

    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102 - as above

    def choices(self, device: Choice) -> Iterable[Choice]:
        """Returns the lines to print before the export."""

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the export as far as it is known without weights."""

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Save the files; return the summary. RunError if the files differ from the model."""

    def describe(self, summary: Mapping[str, Any]) -> Iterable[str]:
        """Returns the lines to print after the export, from its `summary`."""


def plan_export(config: ExportConfig, ref: ModelRef | Mapping[str, ModelRef]) -> Export:
    """Plan the export of a model or of named adapters; InputError if the format lacks support."""
    plan: Export = load(FORMATS[config.format].module).plan_export(config, ref)
    return plan
