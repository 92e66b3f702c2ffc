"""Export embedding models and rerankers for servers: check support, write references and GGUF.

A .gguf file names the pooling. llama.cpp normalizes every embedding and applies no prompts. The
file is read back with the gguf package: its tensors must equal the model's, rounded by torch. The
embeddings of the rounded model are compared with the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from ftlevel.artifacts.files import write_json
from ftlevel.config.export import SERVERS, ExportConfig, Server
from ftlevel.config.section import Choice
from ftlevel.data.encoding.fit import truncate_row
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.events import Listener
from ftlevel.extras.retrieval.encoding import TextEncoder
from ftlevel.extras.retrieval.evaluation import embed_texts
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.objective import Embeddings
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat
from ftlevel.merging.formats.base import Exporter, MergeAdapter, merge_first, start_commands
from ftlevel.merging.formats.gguf import format_size, load_file_vocab, summarize_file
from ftlevel.models.loading import load_config, load_model
from ftlevel.models.sources import ModelSource
from ftlevel.safe_io import save_text
from ftlevel.tasks import TASKS
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.weights.checkpoint import open_base
from ftlevel.weights.gguf_families import FAMILIES, build_metadata, get_gguf_limitations
from ftlevel.weights.gguf_file import (
    GGUFTensor,
    file_keys,
    get_outtype,
    iterate_rounded_weights,
    plan_tensors,
    save_gguf,
)
from ftlevel.weights.gguf_vocabulary import Vocabulary, load_vocab

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's here, they'll see; DON'T!",
    "In 2024, 1,234 of 56789 rows   7 8.90% and 0x1F",
    "def f(x):\n    if x > 10:\n\treturn [i**2 for i in range(x)]",
    "naïve café — Ελληνικά, русский, 日本語テキスト, العربية",
    "how do I reset the password of my account",
    "Rivers carry sand and stones from the mountains to the sea.",
)
"""Texts whose embeddings are compared."""


def check_server(
    config: ExportConfig, embedding_format: EmbeddingFormat, server: Server
) -> list[str]:
    """Returns notes to print; InputError if `server` would compute other embeddings."""
    support, name = server.embeddings, config.model
    if support is None:
        raise InputError(
            f"{name} is an embedding model, and {server.title} serves none. Merge it and load it "
            "with sentence-transformers: --format merged without --for."
        )
    limitations = []
    if embedding_format.pooling not in support.pooling:
        limitations.append(
            f"{name} has {embedding_format.pooling} pooling, and {server.title} has "
            f"{join_names(support.pooling)}. Load it with sentence-transformers."
        )
    if embedding_format.dims is not None:
        limitations.append(
            f"{name} keeps {embedding_format.dims} dimensions (truncate_dim), and {server.title} "
            "returns all. Load it with sentence-transformers."
        )
    is_rescaled = support.normalizes and not embedding_format.normalize
    if is_rescaled and embedding_format.similarity == "dot":
        limitations.append(
            f"{name} compares embeddings of any length by dot product, and {server.title} "
            "normalizes them. Load it with sentence-transformers."
        )
    if embedding_format.lowercase:
        limitations.append(
            f"{name} lowercases its texts (do_lower_case) and its tokenizer does not, so "
            f"{server.title} would read other tokens. Load it with sentence-transformers."
        )
    own = {"query": embedding_format.query_prompt, "document": embedding_format.document_prompt}
    prompts = {name: text for name, text in own.items() if text}
    if prompts and not embedding_format.include_prompt:
        limitations.append(
            f"{name} does not pool its prompts (include_prompt: false), and {server.title} pools "
            "all tokens. Load it with sentence-transformers."
        )
    if prompts and not support.prompts and not config.client_prompts:
        limitations.append(
            f"{name} was trained with prompts ({_format_prompts(prompts)}), and {server.title} "
            "applies none. Add --client-prompts if your client puts them before its texts."
        )
    if limitations:
        raise InputError(limitations)
    notes = []
    if prompts and not support.prompts:
        notes.append(
            f"your client has to put the prompts before its texts: {_format_prompts(prompts)}"
        )
    if is_rescaled:
        notes.append(f"{server.title} normalizes embeddings; cosine similarities stay the same")
    return notes


def _format_prompts(prompts: dict[str, str]) -> str:
    return join_names([f"{name} {text!r}" for name, text in prompts.items()])


def embed(
    model: Any, embedding_format: EmbeddingFormat, tokenizer: Any, end: int | None, device: str
) -> torch.Tensor:
    """Returns float32 embeddings `(texts, dims)` of `TEXTS`; `end` is a token id to append."""
    texts = TextEncoder(tokenizer, "", "", end).documents(TEXTS)
    max_length = embedding_format.max_length or max(text.length for text in texts)
    rows = [truncate_row(text, max_length) for text in texts]
    objective = Embeddings("ndcg@10", format=embedding_format)
    with torch.no_grad():
        return embed_texts(model, objective, rows, tokenizer.pad_token_id or 0, device)


QUERY = TEXTS[4]
"""Query of the documents `TEXTS` whose scores are compared."""


POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3}
"""llama.cpp's numbers of pooling modes (`enum llama_pooling_type`)."""
_CLASS = "AutoModel"


class EmbeddingExporter(Exporter):
    """Export of embedding models: the server has to pool and normalize as the model does."""

    records: ClassVar[bool] = True

    def resolve_config(self, config: ExportConfig) -> ExportConfig:
        return config.for_embeddings()

    def check_server(self, config: ExportConfig, ref: ModelRef, server: Server) -> list[str]:
        return check_server(config, self.get_format(ref), server)

    def get_format(self, ref: ModelRef) -> EmbeddingFormat:
        """Returns how the model of `ref` embeds texts."""
        return EmbeddingFormat(**ref.card.options["embedding"]["form"])

    def plan_gguf(self, config: ExportConfig, ref: ModelRef) -> GgufEmbeddingExport:
        return _plan_gguf(config, ref, self.get_format(ref))

    def record(self, path: Path, config: ExportConfig, model: LoadedModel, dtype: str) -> None:
        """Save the texts `TEXTS` with the embeddings that a server must return for them."""
        end = model.ref.card.options["embedding"]["end"]
        vectors = embed(model.model, self.get_format(model.ref), model.tokenizer, end, model.device)
        save_record(path, config, "embeddings", dtype, vectors.tolist())


class RerankingExporter(Exporter):
    """Export of rerankers."""

    records: ClassVar[bool] = True

    def resolve_config(self, config: ExportConfig) -> ExportConfig:
        return config.for_embeddings()

    def check_server(self, config: ExportConfig, ref: ModelRef, server: Server) -> list[str]:
        """Returns a note about scores of text-embeddings-inference, besides the usual check."""
        notes = [*super().check_server(config, ref, server)]
        if server.name == "tei":
            returned = "sigmoids of the logits, or the logits with raw_scores"
            notes = [f"{server.title} returns {returned}"]
        return notes

    def plan_gguf(self, config: ExportConfig, ref: ModelRef) -> None:
        """Raise InputError: llama.cpp computes no reranker's scores as transformers does."""
        family = ref.model_config.model_type
        message = _GGUF_LIMITATIONS.get(
            family, f"llama.cpp has no tensor for the head of a {family} reranker"
        )
        raise InputError(
            f"{config.model} is a reranker, and {message}. Use --for vllm or --for tei, which "
            "serve it merged."
        )

    def record(self, path: Path, config: ExportConfig, model: LoadedModel, dtype: str) -> None:
        """Save the logits for `QUERY` with `TEXTS` as documents, and the activation."""
        task: Any = model.task
        inference = InferenceModel(model, GenerationOptions(1), None, truncate=True)
        query = EmbeddingRow(QUERY, 0, TEXTS, (0.0,) * len(TEXTS))
        with inference.inference():
            (scores,) = task.score_documents(inference, [query])
        activation = "sigmoid" if task.config.loss == "bce" else "identity"
        save_record(path, config, "scores", dtype, scores, activation=activation, query=QUERY)


_GGUF_LIMITATIONS = {
    "bert": "llama.cpp gives every token of BERT the segment of the query, so a document would "
    "have other states",
    "qwen3": "llama.cpp takes the softmax over the scores of Qwen3, which is 1 for a single one",
}
"""Model type → why llama.cpp cannot compute a reranker's scores."""


def save_record(
    path: Path, config: ExportConfig, kind: str, dtype: str, values: Sequence[Any], **more: str
) -> None:
    """Save the texts `TEXTS` with `values`, their embeddings or scores, which `kind` names."""
    name = "vector" if kind == "embeddings" else "score"
    rows = [{"text": text, name: value} for text, value in zip(TEXTS, values, strict=True)]
    metadata = {"format": 1, "type": kind, "model": config.model, "server": config.server}
    write_json(path, {**metadata, "dtype": dtype, **more, "texts": rows})


def _plan_gguf(
    config: ExportConfig, ref: ModelRef, embedding_format: EmbeddingFormat
) -> GgufEmbeddingExport:
    notes = check_server(config, embedding_format, SERVERS[config.server or "llama.cpp"])
    model_config = load_config(ref.source)
    if problems := get_gguf_limitations(model_config):
        raise InputError([f"{config.model} cannot be written as GGUF: {one}" for one in problems])
    tokenizer = ref.load_tokenizer()
    ref.configured_task.prepare_tokenizer(tokenizer, ref.model_kind)
    last = tokenizer("a")["input_ids"][-1]
    is_end = embedding_format.pooling == "last" and last in tokenizer.all_special_ids
    end = last if is_end else None
    vocab = load_file_vocab(config.model, ref, model_config, tokenizer, end)
    notes += vocab.notes
    return GgufEmbeddingExport(
        config, ref, embedding_format, model_config, tokenizer, vocab, end, notes
    )


@dataclass(frozen=True)
class GgufEmbeddingExport:
    """Planned .gguf export of an embedding model; `end` is the token appended to texts, if any."""

    config: ExportConfig
    ref: ModelRef
    format: EmbeddingFormat
    model_config: Any
    tokenizer: Any
    vocab: Vocabulary
    end: int | None
    notes: Sequence[str]

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yields the lines to print before the export."""
        config, embedding_format = self.config, self.format
        merges = self.ref.directory is not None
        method = self.ref.card.method
        yield Choice("model", config.model, f"{method}, merged first" if merges else "as it is")
        architecture = FAMILIES[self.model_config.model_type].architecture
        yield Choice("architecture", architecture, "an embedding model")
        yield Choice("pooling", embedding_format.pooling, "pooling_type in the file")
        yield Choice("outtype", config.outtype, "the model's own" * (config.outtype == "auto"))
        yield Choice("tokenizer", self.vocab.model)
        yield Choice("out", config.out)
        if config.verify:
            yield device

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export."""
        outtype: str = self.config.outtype
        tensors: list[GGUFTensor] = []
        if self.ref.source.kind != "gguf":  # a .gguf base has no shapes before it is loaded
            checkpoint, unused = self._open(self.ref.source, self.model_config)
            outtype = get_outtype(checkpoint) if outtype == "auto" else outtype
            tensors = plan_tensors(checkpoint, self.model_config, outtype, unused=unused)
        return self._summary(outtype, tensors)

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Save the .gguf file and its Modelfile in `output`, check them, return the summary."""
        config, model_config, vocab = self.config, self.model_config, self.vocab
        merged, source = merge_first(self.ref, output, listener, merge)
        if self.ref.directory is not None:
            model_config = load_config(source)
            vocab = load_vocab(self.tokenizer, model_config.vocab_size, self.end)
        checkpoint, unused = self._open(source, model_config)
        outtype = get_outtype(checkpoint) if config.outtype == "auto" else config.outtype
        tensors = plan_tensors(checkpoint, model_config, outtype, merged.choose, unused)
        listener.stage(f"writing {len(tensors):,} tensors")
        listener.begin(len(tensors))
        path = output / config.out.name
        save_gguf(path, self._metadata(model_config, vocab, outtype), tensors, listener.step)
        modelfile = f"FROM ./{config.out.name}\n"
        save_text(output / config.outputs[1].name, modelfile)
        check = None
        if config.verify:
            listener.stage("reloading the file and comparing")
            model, _ = load_model(source, model_config, _CLASS, dtype=torch.float32, device=device)
            args = (self.format, self.tokenizer, self.end, device)
            expected = embed(model.eval(), *args)
            with torch.no_grad():
                for name, rounded in iterate_rounded_weights(tensors, model):
                    model.get_parameter(name).copy_(rounded)
            _check_tensors(path, tensors, model)
            vectors = embed(model, *args)
            similarities = torch.nn.functional.cosine_similarity(vectors, expected)
            check = {"texts": len(vectors), "min_cosine": float(similarities.min())}
            if config.recorded:
                record_path = output / config.outputs[2].name
                save_record(record_path, config, "embeddings", outtype, vectors.tolist())
        return self._summary(outtype, tensors) | {
            "size_bytes": path.stat().st_size,
            "merged": merged.facts,
            "verified": check is not None,
            "check": check,
        }

    def _open(self, source: ModelSource, model_config: Any) -> tuple[Any, list[str]]:
        """Open the checkpoint of `source`; also returns the modules that embeddings do not use."""
        checkpoint = open_base(source, model_config, _CLASS)
        return checkpoint, TASKS[self.ref.task].get_unused_modules(checkpoint.model)

    def _metadata(self, model_config: Any, vocab: Vocabulary, outtype: str) -> dict[str, Any]:
        architecture = FAMILIES[model_config.model_type].architecture
        names: dict[str, Any] = {
            "general.architecture": architecture,
            "general.name": self.config.out.stem,
        }
        keys = names | file_keys(outtype) | build_metadata(model_config) | vocab.metadata()
        keys[f"{architecture}.pooling_type"] = POOLING_TYPES[self.format.pooling]
        if architecture == "bert":
            keys["tokenizer.ggml.token_type_count"] = model_config.type_vocab_size
        return keys

    def _summary(self, outtype: str, tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
        config = self.config
        return (
            config.entries
            | summarize_file(self.ref, self.model_config, outtype, tensors)
            | {
                "pooling": self.format.pooling,
                "prompts": {name: text for name, text in self.format.all_prompts.items() if text},
                "start": start_commands(config.server, config.out, self.format),
                "notes": list(self.notes),
            }
        )

    @staticmethod
    def describe(summary: Mapping[str, Any]) -> Iterator[str]:
        """Yields the lines to print after the export."""
        yield f"{summary['architecture']}, {summary['pooling']} pooling: {format_size(summary)}"
        if summary.get("dry_run"):
            yield "dry run: everything was checked, nothing was written."
            return
        if (check := summary["check"]) is None:
            yield "not verified (--no-verify)"
        else:
            yield (
                f"read back: every tensor is the model's; embeddings of {check['texts']} texts "
                f"have cosine {check['min_cosine']:.6f} or more to the model's"
            )
        yield f"saved {', '.join(summary['outputs'])}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])


def _check_tensors(path: Path, tensors: Sequence[GGUFTensor], model: Any) -> None:
    """Raise RunError if a tensor of the file differs from the rounded weight in `model`."""
    file_tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for tensor in tensors:
        file_tensor = file_tensors[tensor.name]
        values = dequantize(file_tensor.data, file_tensor.tensor_type).reshape(tensor.shape)
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
