"""Export the merged model in transformers' format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import library_versions
from ftlevel.config.section import Choice
from ftlevel.errors import InputError
from ftlevel.events import Listener
from ftlevel.extras.serving.config import SERVERS, ExportConfig
from ftlevel.extras.serving.entry import check_command, serving_lines
from ftlevel.extras.serving.formats import (
    MergeAdapter,
    exporter_of,
    stop_notes,
)
from ftlevel.extras.serving.recorded import record_whole, start_commands
from ftlevel.models.sources import resolve_source
from ftlevel.safe_io import open_existing
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef


def plan_export(config: ExportConfig, ref: ModelRef) -> MergedExport:
    """Plan the export; InputError without an adapter, or if the server cannot serve the model."""
    if ref.directory is None:
        raise InputError(
            f"{config.model} is a whole model already, and is served as it is. Drop the export."
        )
    if config.server is None:
        return MergedExport(config, ref, stop_notes(config.model, ref, None))
    notes = exporter_of(config, ref).check_server(SERVERS[config.server])
    return MergedExport(config, ref, notes)


@dataclass(frozen=True)
class MergedExport:
    """Planned export of a merged model, before any weights are read."""

    config: ExportConfig
    ref: ModelRef
    notes: Sequence[str] = ()

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yields the lines to print before the export."""
        yield Choice("adapter", self.config.model, f"{self.ref.card.method}, merged")
        yield Choice("base", self.ref.base)
        yield Choice("out", self.config.out)
        yield device

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export."""
        return self._summary(None)

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Save the merged model in `output`; return the summary."""
        listener.stage("merging the adapter")
        merged_dir = output / "merged"
        merged = merge(merged_dir).summary
        for path in sorted(merged_dir.iterdir()):
            path.rename(output / path.name)
        merged_dir.rmdir()
        summary = self._summary(merged)
        task, is_recorded = TASKS[self.ref.task], bool(self.config.server and self.config.verify)
        if is_recorded and task.generates_text:
            listener.stage("recording reference outputs")
            source = resolve_source(str(output))
            metadata = {
                "model": self.config.model,
                "server": self.config.server,
                "file_format": self.config.format,
                "dtype": merged["written"]["dtype"],
            }
            record_whole(
                output / "served.json", self.config.out, metadata, self.ref, source, device
            )
            summary["recorded"] = True
        exporter = exporter_of(self.config, self.ref)
        if is_recorded and exporter.records:
            listener.stage("recording reference embeddings or scores")
            source = resolve_source(str(output))
            plain = self.ref.with_card(
                method="full", quantization={"kind": "none"}, dtype="float32"
            )
            merged_model = replace(plain, source=source, directory=None).load(device)
            exporter.record(output / "served.json", merged_model)
            summary["recorded"] = True
        if self.config.server:
            with open_existing(output / "README.md") as card:
                card.write("\n" + "\n".join(serving_lines(summary)))
        return summary

    def _summary(self, merged: Mapping[str, Any] | None) -> dict[str, Any]:
        exporter = exporter_of(self.config, self.ref)
        return {
            "model": self.config.model,
            "method": self.ref.card.method,
            "format": self.config.format,
            "server": self.config.server,
            "merged": merged and {key: merged[key] for key in ("onto", "verified", "agreement")},
            "verified": bool(merged and merged["verified"]),
            "start": start_commands(self.config.server, self.config.out, exporter.format),
            "recorded": False,
            "out": str(self.config.out),
            "versions": library_versions(),
        }

    @staticmethod
    def describe(summary: Mapping[str, Any]) -> Iterator[str]:
        """Yields the lines to print after the export."""
        if summary.get("dry_run"):
            yield "dry run: everything was checked, nothing was written."
        else:
            check = "checked as ftlevel merge does" if summary["verified"] else "not checked"
            yield f"merged onto the {summary['merged']['onto']} weights, {check}"
            yield f"saved {summary['out']}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])
            if summary["recorded"]:
                yield f"then: {check_command(summary)}"
