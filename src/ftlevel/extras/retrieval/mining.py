"""`mine`: add hard negatives to queries with positives, found by an embedding model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ftlevel.artifacts.row_files import check_row_file, row_file_type
from ftlevel.artifacts.row_sinks import RowColumns
from ftlevel.config.section import Choice, check_config
from ftlevel.data.formats.detect import detect_format
from ftlevel.data.formats.examples import to_examples
from ftlevel.data.sources.readers import ReadOptions, load_table
from ftlevel.errors import InputError
from ftlevel.evaluation.answers import InferenceModel
from ftlevel.events import Listener, NullListener
from ftlevel.extras.retrieval.config import MineConfig
from ftlevel.extras.retrieval.evaluation import as_document, embed_rows
from ftlevel.extras.retrieval.formats import QUERY_SHAPES, RANKING_SHAPES, EmbeddingRow
from ftlevel.extras.retrieval.metrics import BLOCK_BYTES, iterate_scores
from ftlevel.models.hardware import select_device, select_threads
from ftlevel.models.loading import silence_loggers
from ftlevel.trained.generation import GenerationOptions, batches
from ftlevel.trained.resolve import get_dtype_source, resolve_model

TASK = "embedding"
WINDOW = 2_048
"""Number of rows that are read to find their columns, and that are written at once."""


def mine(config: MineConfig, *, listener: Listener | None = None) -> Mapping[str, Any]:
    """Write each query with its positives and hard negatives; return the output of `--json`.

    A query without any negative in the range of ranks is left out. Raises ConfigError if the output
    exists, or an option does not fit; InputError if the rows have no positives, or the model is no
    embedding model.
    """
    check_config(config, MineConfig)
    listener = listener or NullListener()
    check_row_file("--out", config.output, resume=False, overwrite=config.overwrite)
    with silence_loggers():
        listener.stage("reading the data")
        rows, described = _load_rows(config)
        corpus = Corpus(rows, _load_corpus(config))
        if len(corpus.texts) == 1:
            raise InputError(
                f"{config.dataset} has one distinct document, which is the positive of all rows. "
                "Add documents by --corpus."
            )
        device = select_device(config.device)
        ref = resolve_model(
            config.name, TASK, config.base_model, device=device.value, dtype=config.dtype
        )
        first, last = config.rank_range
        listener.choices(
            "mine",
            [
                Choice("model", config.name, f"base {ref.source.name}"),
                Choice("rows", config.dataset, f"{len(rows):,} rows"),
                Choice("columns", described, "by --map" if config.columns else ""),
                Choice("corpus", f"{len(corpus.texts):,} distinct documents"),
                Choice("negatives", config.negatives, f"{config.sampling} of ranks {first}-{last}"),
                Choice("relative margin", f"{config.relative_margin:g}"),
                Choice("dtype", ref.card.dtype, get_dtype_source(ref, config.dtype)),
                device,
                select_threads(),
            ],
        )
        listener.stage("loading the model")
        start_time = time.perf_counter()
        trained = ref.load(device.value)
        model = InferenceModel(trained, GenerationOptions(1), config.batch_size, truncate=True)
        listener.stage("embedding")
        texts = [EmbeddingRow(row.query, 0, prompt=row.prompt) for row in rows]
        texts += map(as_document, corpus.texts)
        with model.inference():
            vectors = embed_rows(model, texts, listener.answered)
        if model.shortened:
            listener.warn(f"{model.shortened:,} texts exceed the maximum length and are truncated.")
        listener.stage("searching")
        similarity = trained.task.format.similarity  # type: ignore[attr-defined]  # of EmbeddingTask
        queries, documents = vectors[: len(rows)], vectors[len(rows) :]
        mined = list(
            find_negatives(rows, corpus, queries, documents, config, similarity=similarity)
        )
        lines = list(_build_lines(config, corpus, list(zip(rows, mined, strict=True))))
        if not lines:
            raise InputError(
                f"no row has a negative at ranks {first}-{last} with --relative-margin "
                f"{config.relative_margin:g}. Lower them, or add documents by --corpus."
            )
        file = row_file_type("--out", config.output)(config.output, RowColumns(list(lines[0])))
        file.open(0)
        for part in batches(lines, WINDOW):
            file.write(part)
        file.finalize()
    return {
        "name": config.name,
        "dataset": config.dataset,
        "output": str(config.output),
        "documents": len(corpus.texts),
        "rows": len(lines),
        "left_out": len(rows) - len(lines),
        "negatives": sum(len(line["neg"]) for line in lines),
        "skipped": sum(row.skipped for row in mined),
        "shortened": model.shortened,
        "seconds": time.perf_counter() - start_time,
    }


def _load_rows(config: MineConfig) -> tuple[list[EmbeddingRow], str]:
    table = load_table(
        config.dataset, options=ReadOptions(config.input_format, ignored=config.ignore_columns)
    )
    names, sample = table.column_names, table.rows[:WINDOW]
    format_ = detect_format(names, TASK, RANKING_SHAPES, config.columns, config.format, sample)
    rows: list[EmbeddingRow] = list(to_examples(table, format_))  # type: ignore[arg-type]
    for row in rows:
        if not row.positives:
            raise InputError(
                f"{table.where(row.row)}: has no positive, from which negatives have to differ. "
                "Leave out such rows."
            )
    return rows, format_.description


def _load_corpus(config: MineConfig) -> list[str]:
    if config.corpus is None:
        return []
    table = load_table(config.corpus)
    shapes = [shape for shape in QUERY_SHAPES if shape.name == "text"]
    format_ = detect_format(table.column_names, TASK, shapes, rows=table.rows[:WINDOW])
    return [row.documents[0] for row in to_examples(table, format_)]  # type: ignore[attr-defined]


def _build_lines(
    config: MineConfig, corpus: Corpus, rows: Sequence[tuple[EmbeddingRow, MinedRow]]
) -> Iterator[dict[str, Any]]:
    has_prompts = any(row.prompt for row, _ in rows)
    for row, mined in rows:
        if not mined.negatives:
            continue
        line: dict[str, Any] = {
            "query": row.query,
            "pos": list(row.positives),
            "neg": [corpus.texts[at] for at in mined.negatives],
        }
        if has_prompts:
            line["prompt"] = row.prompt
        if config.scores:
            line["pos_scores"] = list(mined.positive_scores)
            line["neg_scores"] = list(mined.negative_scores)
        yield line


@dataclass(frozen=True)
class MinedRow:
    """Negatives of a row as corpus indices, best first, with scores of positives and negatives.

    `skipped` is the number of documents whose score is too high for a negative.
    """

    negatives: tuple[int, ...]
    positive_scores: tuple[float, ...]
    negative_scores: tuple[float, ...]
    skipped: int


class Corpus:
    """Distinct documents `texts` to select negatives from, and text -> index (`positions`)."""

    def __init__(self, rows: Sequence[EmbeddingRow], documents: Sequence[str] = ()) -> None:
        own = (text for row in rows for text in row.documents)
        self.texts = list(dict.fromkeys([*own, *documents]))
        self.positions: Mapping[str, int] = {text: at for at, text in enumerate(self.texts)}
        self._positives: dict[str, set[int]] = {}
        for row in rows:
            positives = self._positives.setdefault(row.query, set())
            positives |= {self.positions[text] for text in row.positives}
            if row.query in self.positions:
                positives.add(self.positions[row.query])

    def excluded(self, query: str) -> list[int]:
        """Returns indices of the query's positives in any row, and of the query as a document."""
        return sorted(self._positives[query])


def find_negatives(
    rows: Sequence[EmbeddingRow],
    corpus: Corpus,
    queries: torch.Tensor,
    documents: torch.Tensor,
    config: MineConfig,
    *,
    similarity: str = "cosine",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[MinedRow]:
    """Yields the mined negatives of each row; the search is exact, in blocks of queries.

    `queries` `(rows, dims)` and `documents` `(documents, dims)` are embeddings; `similarity` is
    cosine or dot. The scores of a block take `block_bytes` of memory.
    """
    generator = np.random.default_rng(config.seed)
    first, last = config.rank_range
    for start, block in iterate_scores(queries, documents, similarity, block_bytes):
        for number, scores in enumerate(block):
            row = rows[start + number]
            positives = [corpus.positions[text] for text in row.positives]
            own = scores[positives].tolist()
            limit = min(own) - config.relative_margin * abs(min(own))
            scores[corpus.excluded(row.query)] = -torch.inf
            above = scores > limit
            scores[above] = -torch.inf
            found = scores.topk(min(last, len(scores)))
            num_finite = int(torch.isfinite(found.values).sum())
            window = np.arange(first - 1, num_finite)
            if config.sampling == "random" and len(window) > config.negatives:
                window = np.sort(generator.choice(window, config.negatives, replace=False))
            window = window[: config.negatives]
            yield MinedRow(
                tuple(found.indices[window].tolist()),
                tuple(own),
                tuple(found.values[window].tolist()),
                int(above.sum()),
            )
