"""Embedding models for servers: what a server computes otherwise, and reference embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.sentence_transformers import EmbeddingFormat
from ftlevel.config.export import ExportConfig, Server
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import InputError, join_names
from ftlevel.evaluation.embeddings import embed_texts
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.tasks.embedding.rows import TextEncoder

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's here, they'll see; DON'T!",
    "In 2024, 1,234 of 56789 rows   7 8.90% and 0x1F",
    "def f(x):\n    if x > 10:\n\treturn [i**2 for i in range(x)]",
    "naïve café — Ελληνικά, русский, 日本語テキスト, العربية",
    "how do I reset the password of my account",
    "Rivers carry sand and stones from the mountains to the sea.",
)
"""Texts whose embeddings are compared."""


def check_server(config: ExportConfig, form: EmbeddingFormat, server: Server) -> list[str]:
    """Return notes on an embedding model that `server` computes as it was trained.

    Raises:
        InputError: the server would return other embeddings.
    """
    support, name = server.embeddings, config.model
    if support is None:
        raise InputError(
            f"{name} is an embedding model, and {server.title} serves none. Merge it and load it "
            "with sentence-transformers: --format merged without --for."
        )
    problems = []
    if form.pooling not in support.pooling:
        problems.append(
            f"{name} has {form.pooling} pooling, and {server.title} has "
            f"{join_names(support.pooling)}. Load it with sentence-transformers."
        )
    if form.dims is not None:
        problems.append(
            f"{name} keeps {form.dims} dimensions (truncate_dim), and {server.title} returns all. "
            "Load it with sentence-transformers."
        )
    if support.normalizes and not form.normalize and form.similarity == "dot":
        problems.append(
            f"{name} compares embeddings of any length by dot product, and {server.title} "
            "normalizes them. Load it with sentence-transformers."
        )
    prompts = {name: text for name, text in form.all_prompts.items() if text}
    if prompts and not form.include_prompt:
        problems.append(
            f"{name} does not pool its prompts (include_prompt: false), and {server.title} pools "
            "all tokens. Load it with sentence-transformers."
        )
    if prompts and not support.prompts and not config.client_prompts:
        problems.append(
            f"{name} was trained with prompts ({_describe(prompts)}), and {server.title} applies "
            "none. Add --client-prompts if your client puts them before its texts."
        )
    if problems:
        raise InputError(problems)
    notes = []
    if prompts and not support.prompts:
        notes.append(f"your client has to put the prompts before its texts: {_describe(prompts)}")
    if support.normalizes and not form.normalize:
        notes.append(f"{server.title} normalizes embeddings; cosine similarities stay the same")
    return notes


def _describe(prompts: dict[str, str]) -> str:
    return join_names([f"{name} {text!r}" for name, text in prompts.items()])


def embed(
    model: Any, form: EmbeddingFormat, tokenizer: Any, end: int | None, device: str
) -> torch.Tensor:
    """Return the embeddings of `TEXTS` without prompts, `(texts, dims)` in float32."""
    ids = TextEncoder(tokenizer, "", "", end).ids(TEXTS)
    longest = form.max_length or len(max(ids, key=len))
    rows = [Encoded(part[:longest], 0, at) for at, part in enumerate(ids)]
    objective = Embeddings("ndcg@10", form=form)
    with torch.no_grad():
        return embed_texts(model, objective, rows, tokenizer.pad_token_id or 0, device)


def write_vectors(path: Path, config: ExportConfig, vectors: torch.Tensor, dtype: str) -> None:
    """Write `TEXTS` with the embeddings that a server must return for them."""
    facts = {"format": 1, "type": "embeddings", "model": config.model, "server": config.server}
    rows = [{"text": t, "vector": v.tolist()} for t, v in zip(TEXTS, vectors, strict=True)]
    write_json(path, {**facts, "dtype": dtype, "texts": rows})
