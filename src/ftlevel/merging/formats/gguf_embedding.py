"""Export an embedding model as one .gguf file for llama.cpp.

The file names the pooling. llama.cpp normalizes every embedding and applies no prompts. The file is
read back with the gguf package: its tensors must equal those of the model rounded by torch, and the
embeddings of the rounded model are compared with the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.sentence_transformers import EmbeddingFormat
from ftlevel.config import ExportConfig
from ftlevel.config.export import SERVERS
from ftlevel.config.section import Choice
from ftlevel.errors import InputError, RunError
from ftlevel.events import Listener
from ftlevel.merging.formats.base import MergeAdapter, merge_first, start_commands
from ftlevel.merging.formats.embedding import check_server, embed, write_vectors
from ftlevel.models.loading import build_task_model, load_config, load_model, rename_prefix
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.checkpoint import open_checkpoint
from ftlevel.weights.gguf.families import FAMILIES, build_metadata, find_problems
from ftlevel.weights.gguf.file import (
    GGUFTensor,
    file_keys,
    own_outtype,
    plan_tensors,
    weights_as_written,
    write_gguf,
)
from ftlevel.weights.gguf.vocabulary import Vocabulary, read_vocabulary

POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3}
"""llama.cpp's numbers of pooling modes (`enum llama_pooling_type`)."""
_CLASS = "AutoModel"


def plan_export(config: ExportConfig, ref: ModelRef, form: EmbeddingFormat) -> GgufEmbeddingExport:
    """Plan the export; raise InputError if llama.cpp would compute other embeddings."""
    notes = check_server(config, form, SERVERS[config.server or "llama.cpp"])
    model_config = load_config(ref.source)
    if problems := find_problems(model_config):
        raise InputError([f"{config.model} cannot be written as GGUF: {one}" for one in problems])
    tokenizer = ref.load_tokenizer()
    ref.configured_task.prepare_tokenizer(tokenizer, ref.model_kind)
    end = tokenizer("a")["input_ids"][-1] if form.pooling == "last" else None
    try:
        size = max(model_config.vocab_size, len(tokenizer) if ref.directory else 0)
        vocabulary = read_vocabulary(tokenizer, size, end)
    except InputError as error:
        raise InputError(f"{config.model} cannot be written as GGUF: {error}") from None
    notes += vocabulary.notes
    return GgufEmbeddingExport(config, ref, form, model_config, tokenizer, vocabulary, end, notes)


@dataclass(frozen=True)
class GgufEmbeddingExport:
    """Planned .gguf export of an embedding model; `end` is the token it appends to texts."""

    config: ExportConfig
    ref: ModelRef
    form: EmbeddingFormat
    model_config: Any
    tokenizer: Any
    vocabulary: Vocabulary
    end: int | None
    notes: Sequence[str]

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yield the lines for the console."""
        config, form = self.config, self.form
        merges = self.ref.directory is not None
        method = self.ref.card.method
        yield Choice("model", config.model, f"{method}, merged first" if merges else "as it is")
        architecture = FAMILIES[self.model_config.model_type].architecture
        yield Choice("architecture", architecture, "an embedding model")
        yield Choice("pooling", form.pooling, "pooling_type in the file")
        yield Choice("outtype", config.outtype, "the model's own" * (config.outtype == "auto"))
        yield Choice("tokenizer", self.vocabulary.model)
        yield Choice("out", config.out)
        if config.verify:
            yield device

    def dry_run(self) -> dict[str, Any]:
        """Return the summary of the planned export."""
        checkpoint, unused = self._open(self.ref.source, self.model_config)
        outtype = own_outtype(checkpoint) if self.config.outtype == "auto" else self.config.outtype
        tensors = plan_tensors(checkpoint, self.model_config, outtype, unused=unused)
        return self._summary(outtype, tensors)

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Write the file and its Modelfile into `output`, and compare; return the summary."""
        config, model_config, vocabulary = self.config, self.model_config, self.vocabulary
        merged, source = merge_first(self.ref, output, listener, merge)
        if self.ref.directory is not None:
            model_config = load_config(source)
            vocabulary = read_vocabulary(self.tokenizer, model_config.vocab_size, self.end)
        checkpoint, unused = self._open(source, model_config)
        outtype = own_outtype(checkpoint) if config.outtype == "auto" else config.outtype
        tensors = plan_tensors(checkpoint, model_config, outtype, merged.choose, unused)
        listener.stage(f"writing {len(tensors):,} tensors")
        listener.begin(len(tensors))
        path = output / config.out.name
        write_gguf(path, self._metadata(model_config, vocabulary, outtype), tensors, listener.step)
        modelfile = f"FROM ./{config.out.name}\n"
        (output / config.outputs[1].name).write_text(modelfile, encoding="utf-8")
        check = None
        if config.verify:
            listener.stage("reloading the file and comparing")
            model, _ = load_model(source, model_config, _CLASS, dtype=torch.float32, device=device)
            ask = (self.form, self.tokenizer, self.end, device)
            expected = embed(model.eval(), *ask)
            with torch.no_grad():
                for name, rounded in weights_as_written(tensors, model):
                    model.get_parameter(name).copy_(rounded)
            _check_tensors(path, tensors, model)
            vectors = embed(model, *ask)
            similarities = torch.nn.functional.cosine_similarity(vectors, expected)
            check = {"texts": len(vectors), "min_cosine": float(similarities.min())}
            if config.recorded:
                write_vectors(output / config.outputs[2].name, config, vectors, outtype)
        return self._summary(outtype, tensors) | {
            "size_bytes": path.stat().st_size,
            "merged": merged.facts,
            "verified": check is not None,
            "check": check,
        }

    def _open(self, source: ModelSource, model_config: Any) -> tuple[Any, list[str]]:
        """Open the checkpoint, and the modules that embeddings do not depend on."""
        model = build_task_model(model_config, _CLASS)
        unused = TASKS[self.ref.task].find_unused(model)
        return open_checkpoint(source, model, rename_prefix(model_config, _CLASS)), unused

    def _metadata(self, model_config: Any, vocabulary: Vocabulary, outtype: str) -> dict[str, Any]:
        architecture = FAMILIES[model_config.model_type].architecture
        names: dict[str, Any] = {
            "general.architecture": architecture,
            "general.name": self.config.out.stem,
        }
        keys = names | file_keys(outtype) | build_metadata(model_config) | vocabulary.metadata()
        keys[f"{architecture}.pooling_type"] = POOLING_TYPES[self.form.pooling]
        if architecture == "bert":
            keys["tokenizer.ggml.token_type_count"] = model_config.type_vocab_size
        return keys

    def _summary(self, outtype: str, tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
        config = self.config
        return {
            "model": config.model,
            "method": self.ref.card.method,
            "format": config.format,
            "architecture": FAMILIES[self.model_config.model_type].architecture,
            "outtype": outtype,
            "tensors": len(tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
            "pooling": self.form.pooling,
            "prompts": {name: text for name, text in self.form.all_prompts.items() if text},
            "start": start_commands(config.server, config.out, self.form),
            "out": str(config.out),
            "modelfile": str(config.outputs[1]),
            "notes": list(self.notes),
            "versions": library_versions(),
        }

    @staticmethod
    def describe(summary: Mapping[str, Any]) -> Iterator[str]:
        """Yield the lines of the result."""
        size = f"{summary['tensor_bytes'] / 2**20:,.1f} MiB"
        count = f"{summary['tensors']:,} tensors"
        yield (
            f"{summary['architecture']}, {summary['pooling']} pooling: {count}, "
            f"{summary['outtype']}, {size}"
        )
        if summary.get("dry_run"):
            yield "dry run: everything was checked, nothing was written."
            return
        if (check := summary["check"]) is None:
            yield "not verified (--no-verify)"
        else:
            yield (
                "read back: every tensor is the model's; embeddings of "
                f"{check['texts']} texts have cosine {check['min_cosine']:.6f} or more to the "
                "model's"
            )
        yield f"saved {summary['out']} and {summary['modelfile']}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])


def _check_tensors(path: Path, tensors: Sequence[GGUFTensor], model: Any) -> None:
    """Raise RunError if a tensor of the file differs from the weight in `model`, rounded."""
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for tensor in tensors:
        own = stored[tensor.name]
        values = dequantize(own.data, own.tensor_type).reshape(tensor.shape)
        if tensor.source is None:
            expected = tensor.read()
        else:
            weight = model.get_parameter(tensor.source).detach()
            expected = tensor.arrange(weight.T if tensor.transposed else weight)
        if not np.array_equal(values, expected.float().cpu().numpy()):
            raise RunError(
                f"the file is not the model: its tensor {tensor.name} differs. Nothing was saved. "
                "Please report this with the command."
            )
