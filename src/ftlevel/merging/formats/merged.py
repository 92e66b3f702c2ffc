"""Export the merged model in transformers' format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import library_versions
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat
from ftlevel.config import ExportConfig
from ftlevel.config.export import SERVERS, Server
from ftlevel.config.section import Choice
from ftlevel.errors import InputError, join_names, with_article
from ftlevel.events import Listener
from ftlevel.merging.formats.base import MergeAdapter, server_support, start_commands, stop_notes
from ftlevel.extras.retrieval.export import check_server, embed, save_embeddings, save_scores
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import load_config
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
    notes = tuple(stop_notes(config.model, ref, config.server))
    if config.server is None:
        return MergedExport(config, ref, notes)
    task, server = TASKS[ref.task], SERVERS[config.server]
    if (format_ := task.embedding_format(ref.card.options)) is not None:
        return MergedExport(config, ref, tuple(check_server(config, format_, server)))
    kind = model_kind(load_config(ref.source))
    if (kind if task.generates_text else task.served_as) not in server.merged:
        raise InputError(
            f"{config.model} was trained for {task.name} on {with_article(kind)}, and "
            f"{server.title} serves {_format_served_models(server)}. Keep it with transformers: "
            f"ftlevel merge {quote(config.model)} --out DIR."
        )
    if task.served_as == "rerankers" and server.name == "tei":
        notes = (f"{server.title} returns sigmoids of the logits, or the logits with raw_scores",)
    return MergedExport(config, ref, notes)


def _format_served_models(server: Server) -> str:
    names = [_TEXT.get(name, name) for name in server.merged]
    return join_names([*names, *["embedding models"] * (server.embeddings is not None)])


_TEXT = {
    "decoder": "decoders that write text",
    "encoder-decoder": "encoder-decoders that write text",
}


@dataclass(frozen=True)
class MergedExport:
    """Planned export of a merged model, before any weights are read."""

    config: ExportConfig
    ref: ModelRef
    notes: tuple[str, ...] = ()

    @property
    def _embedding_format(self) -> EmbeddingFormat | None:
        return TASKS[self.ref.task].embedding_format(self.ref.card.options)

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
            server_support().record(
                output / "served.json", self.config.out, metadata, self.ref, source, device
            )
            summary["recorded"] = True
        if is_recorded and (self._embedding_format or task.served_as == "rerankers"):
            listener.stage("recording reference embeddings or scores")
            self._record(output, device)
            summary["recorded"] = True
        if self.config.server:
            with open_existing(output / "README.md") as card:
                card.write("\n" + "\n".join(server_support().readme(summary)))
        return summary

    def _record(self, output: Path, device: str) -> None:
        source = resolve_source(str(output))
        ref = self.ref.with_card(method="full", quantization={"kind": "none"}, dtype="float32")
        merged = replace(ref, source=source, directory=None).load(device)
        path, dtype = output / "served.json", self.ref.card.dtype
        if self._embedding_format is None:
            save_scores(path, self.config.model, self.config.server, merged, dtype)
            return
        end = ref.card.options["embedding"]["end"]
        vectors = embed(merged.model, self._embedding_format, merged.tokenizer, end, device)
        save_embeddings(path, self.config.model, self.config.server, vectors, dtype)

    def _summary(self, merged: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "method": self.ref.card.method,
            "format": self.config.format,
            "server": self.config.server,
            "merged": merged and {key: merged[key] for key in ("onto", "verified", "agreement")},
            "verified": bool(merged and merged["verified"]),
            "start": start_commands(self.config.server, self.config.out, self._embedding_format),
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
                yield f"then: {server_support().check_command(summary)}"
