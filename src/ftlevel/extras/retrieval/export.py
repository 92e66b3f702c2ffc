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
from ftlevel.extras.serving.config import SERVERS, ExportConfig, Server
from ftlevel.extras.serving.formats import Exporter, MergeAdapter
from ftlevel.extras.serving.gguf import GgufFileExport, load_file_vocab
from ftlevel.extras.serving.gguf_families import get_gguf_limitations
from ftlevel.extras.serving.gguf_file import (
    GGUFTensor,
    iterate_rounded_weights,
)
from ftlevel.extras.serving.gguf_vocabulary import Vocabulary
from ftlevel.extras.serving.recorded import start_commands
from ftlevel.models.loading import load_config, load_model
from ftlevel.safe_io import save_text
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import LoadedModel

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's here, they'll see; DON'T!",
    "In 2024, 1,234 of 56789 rows   7 8.90% and 0x1F",
    "def f(x):\n    if x > 10:\n\treturn [i**2 for i in range(x)]",
    "naïve café — Ελληνικά, русский, 日本語テキスト, العربية",
    "how do I reset the password of my account",
    "Rivers carry sand and stones from the mountains to the sea.",
)
"""Texts whose embeddings are compared."""


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


class RetrievalExporter(Exporter):
    """Base class of exports of models that read texts."""

    records: ClassVar[bool] = True

    @property
    def resolved_config(self) -> ExportConfig:
        return self.config.for_embeddings()

    def save(self, path: Path, kind: str, dtype: str, values: Sequence[Any], **more: str) -> None:
        """Save the texts `TEXTS` with `values`, their embeddings or scores, which `kind` names."""
        name = "vector" if kind == "embeddings" else "score"
        rows = [{"text": text, name: value} for text, value in zip(TEXTS, values, strict=True)]
        head = {"model": self.config.model, "server": self.config.server, "dtype": dtype}
        write_json(path, {"format": 1, "type": kind, **head, **more, "texts": rows})


class EmbeddingExporter(RetrievalExporter):
    """Export of embedding models: the server has to pool and normalize as the model does."""

    @property
    def format(self) -> EmbeddingFormat:
        return EmbeddingFormat(**self.ref.card.options["embedding"]["form"])

    def check_server(self, server: Server) -> list[str]:
        """Returns notes to print; InputError if `server` would compute other embeddings."""
        support, name, embedding_format = server.embeddings, self.config.model, self.format
        if support is None:
            raise InputError(
                f"{name} is an embedding model, and {server.title} serves none. Merge it and load "
                "it with sentence-transformers: --format merged without --for."
            )
        limitations = []
        if embedding_format.pooling not in support.pooling:
            limitations.append(
                f"{name} has {embedding_format.pooling} pooling, and {server.title} has "
                f"{join_names(support.pooling)}. Load it with sentence-transformers."
            )
        if embedding_format.dims is not None:
            limitations.append(
                f"{name} keeps {embedding_format.dims} dimensions (truncate_dim), and "
                f"{server.title} returns all. Load it with sentence-transformers."
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
                f"{name} does not pool its prompts (include_prompt: false), and {server.title} "
                "pools all tokens. Load it with sentence-transformers."
            )
        if prompts and not support.prompts and not self.config.client_prompts:
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

    def plan_gguf(self) -> GgufEmbeddingExport:
        """Plan the export; raise InputError if llama.cpp would compute other embeddings."""
        config, ref, embedding_format = self.config, self.ref, self.format
        notes = self.check_server(SERVERS[config.server or "llama.cpp"])
        model_config = load_config(ref.source)
        if problems := get_gguf_limitations(model_config):
            raise InputError(
                [f"{config.model} cannot be written as GGUF: {one}" for one in problems]
            )
        tokenizer = ref.load_tokenizer()
        ref.configured_task.prepare_tokenizer(tokenizer, ref.model_kind)
        last = tokenizer("a")["input_ids"][-1]
        is_end = embedding_format.pooling == "last" and last in tokenizer.all_special_ids
        end = last if is_end else None
        vocab = load_file_vocab(config.model, ref, model_config, tokenizer, end)
        notes += vocab.notes
        return GgufEmbeddingExport(config, ref, model_config, tokenizer, vocab, self, end, notes)

    def record(self, path: Path, model: LoadedModel) -> None:
        end = self.ref.card.options["embedding"]["end"]
        vectors = embed(model.model, self.format, model.tokenizer, end, model.device)
        self.save(path, "embeddings", self.ref.card.dtype, vectors.tolist())


class RerankingExporter(RetrievalExporter):
    """Export of rerankers."""

    def check_server(self, server: Server) -> Sequence[str]:
        """Returns a note about scores of text-embeddings-inference, besides the usual check."""
        notes = super().check_server(server)
        if server.name != "tei":
            return notes
        return [f"{server.title} returns sigmoids of the logits, or the logits with raw_scores"]

    def plan_gguf(self) -> None:
        """Raise InputError: llama.cpp computes no reranker's scores as transformers does."""
        family = self.ref.model_config.model_type
        message = _GGUF_LIMITATIONS.get(
            family, f"llama.cpp has no tensor for the head of a {family} reranker"
        )
        raise InputError(
            f"{self.config.model} is a reranker, and {message}. Use --for vllm or --for tei, which "
            "serve it merged."
        )

    def record(self, path: Path, model: LoadedModel) -> None:
        """Save the logits for `QUERY` with `TEXTS` as documents, and the activation."""
        task: Any = model.task
        inference = InferenceModel(model, GenerationOptions(1), None, truncate=True)
        query = EmbeddingRow(QUERY, 0, TEXTS, (0.0,) * len(TEXTS))
        with inference.inference():
            (scores,) = task.score_documents(inference, [query])
        dtype = self.ref.card.dtype
        activation = "sigmoid" if task.config.loss == "bce" else "identity"
        self.save(path, "scores", dtype, scores, activation=activation, query=QUERY)


_GGUF_LIMITATIONS = {
    "bert": "llama.cpp gives every token of BERT the segment of the query, so a document would "
    "have other states",
    "qwen3": "llama.cpp takes the softmax over the scores of Qwen3, which is 1 for a single one",
}
"""Model type → why llama.cpp cannot compute a reranker's scores."""


@dataclass(frozen=True)
class GgufEmbeddingExport(GgufFileExport):
    """Planned .gguf export of an embedding model; `end` is the token appended to texts, if any."""

    exporter: EmbeddingExporter
    end: int | None
    notes: Sequence[str]

    auto_class: ClassVar[str] = "AutoModel"

    def choices(self, device: Choice) -> Iterator[Choice]:
        yield self._model_choice
        yield Choice("architecture", self.architecture, "an embedding model")
        yield Choice("pooling", self.exporter.format.pooling, "pooling_type in the file")
        yield self._outtype_choice
        yield Choice("tokenizer", self.vocab.model)
        yield Choice("out", self.config.out)
        if self.config.verify:
            yield device

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        config, file = self.config, self._write_file(output, listener, merge, self.end)
        save_text(output / config.outputs[1].name, f"FROM ./{config.out.name}\n")
        check = None
        if config.verify:
            listener.stage("reloading the file and comparing")
            options: Any = {"dtype": torch.float32, "device": device}
            model, _ = load_model(file.source, file.model_config, self.auto_class, **options)
            args = (self.exporter.format, self.tokenizer, self.end, device)
            expected = embed(model.eval(), *args)
            with torch.no_grad():
                for name, rounded in iterate_rounded_weights(file.tensors, model):
                    model.get_parameter(name).copy_(rounded)
            _check_tensors(file.path, file.tensors, model)
            vectors = embed(model, *args)
            similarities = torch.nn.functional.cosine_similarity(vectors, expected)
            check = {"texts": len(vectors), "min_cosine": float(similarities.min())}
            if config.recorded:
                record_path = output / config.outputs[2].name
                self.exporter.save(record_path, "embeddings", file.outtype, vectors.tolist())
        return self._summarize(file, check)

    def _metadata(self, model_config: Any, vocab: Vocabulary, outtype: str) -> dict[str, Any]:
        keys = super()._metadata(model_config, vocab, outtype)
        keys[f"{self.architecture}.pooling_type"] = POOLING_TYPES[self.exporter.format.pooling]
        if self.architecture == "bert":
            keys["tokenizer.ggml.token_type_count"] = model_config.type_vocab_size
        return keys

    def _summary(self, outtype: str, tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
        format_ = self.exporter.format
        return super()._summary(outtype, tensors) | {
            "pooling": format_.pooling,
            "prompts": {name: text for name, text in format_.all_prompts.items() if text},
            "start": start_commands(self.config.server, self.config.out, format_),
            "notes": list(self.notes),
        }

    @staticmethod
    def _describe_check(summary: Mapping[str, Any]) -> Iterator[str]:
        if (check := summary["check"]) is None:
            yield "not verified (--no-verify)"
        else:
            yield (
                f"read back: every tensor is the model's; embeddings of {check['texts']} texts "
                f"have cosine {check['min_cosine']:.6f} or more to the model's"
            )


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
