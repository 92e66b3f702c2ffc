"""Embedding models for retrieval and similarity, trained on pairs, scores or classes of texts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config.section import Choice, list_unread
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.sources.table import Table
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.extras.retrieval.beir import load_corpus, load_retrieval_set, retrieval_files
from ftlevel.extras.retrieval.config import (
    DEFAULT_LOSSES,
    EMBEDDING_LOSSES,
    PARAMETERS,
    EmbeddingConfig,
)
from ftlevel.extras.retrieval.encoding import (
    TextEncoder,
    append_end,
    check_documents,
    check_eval_set,
    keeps_case,
    lowercase,
)
from ftlevel.extras.retrieval.formats import EMBEDDING_SHAPES, QUERY_SHAPES, EmbeddingRow
from ftlevel.extras.retrieval.objective import (
    EVALUATED_ROWS,
    METRICS,
    Embeddings,
    LabelKind,
    without_first,
)
from ftlevel.extras.retrieval.rows import EncodedText, EncodedTexts
from ftlevel.extras.retrieval.sentence_transformers import (
    FILES,
    EmbeddingFormat,
    get_task_type,
    load_embedding_format,
    save_embedding_format,
)
from ftlevel.models.sources import ModelSource, download_files
from ftlevel.objectives import Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    TokenDecoder,
)

if TYPE_CHECKING:
    import torch

    from ftlevel.config import DataConfig
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder, EncodingContext, PreparedData
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.data.sources.splits import DatasetSplits

_FORM = ("pooling", "normalize", "similarity", "query_prompt", "document_prompt", "include_prompt")
"""Settings that replace those of the model's format."""


def get_task_of_texts(directory: Path | None, model_config: Any) -> str:
    """Returns the task of a model that reads texts: embedding or reranking."""
    from ftlevel.models.kinds import checkpoint_class

    is_classifier = checkpoint_class(model_config) == "AutoModelForSequenceClassification"
    own = get_task_type(directory) if directory is not None else None
    is_reranker = is_classifier and model_config.num_labels == 1
    return own or ("reranking" if is_reranker else "embedding")


@dataclass(frozen=True)
class RetrievalTask(BaseTask):
    """Base class of the tasks of embedding models and rerankers; `teacher` scores documents."""

    teacher: str | None = None

    changes_tokenizer: ClassVar[bool] = True

    def recognizes(self, directory: Path) -> bool:
        return get_task_type(directory) == self.name

    def check_training_set(self, training_set: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        return check_documents(training_set)


@dataclass(frozen=True)
class EmbeddingTask(RetrievalTask):
    """Task of a model with one vector per text; `format` is how the model pools and normalizes."""

    config: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    format: EmbeddingFormat = field(default_factory=EmbeddingFormat)
    end: int | None = None
    step_rows: int = EVALUATED_ROWS

    hooks: ClassVar[str] = "ftlevel.extras.retrieval.hooks:EmbeddingHooks"
    exporter: ClassVar[str] = "ftlevel.extras.retrieval.export:EmbeddingExporter"
    served_as: ClassVar[str] = "embedding models"
    model_description: ClassVar[str] = "an embedding model"
    prediction_type: ClassVar[Column] = "embedding"

    # ---- the model

    def configured(self, task_config: Mapping[str, Any]) -> EmbeddingTask:
        values = dict(task_config.get("embedding", {}))
        if not values:
            return self
        format_ = EmbeddingFormat(**values.pop("form")) if "form" in values else self.format
        values.pop("kind", None)
        names = ("step_rows", "end", "teacher")
        own = {name: values.pop(name, getattr(self, name)) for name in names}
        return replace(self, config=EmbeddingConfig(**values), format=format_, **own)

    def for_model(
        self, source: ModelSource, kind: str, width: int, tokenizer: Any, step_rows: int
    ) -> tuple[BaseTask, list[Choice]]:
        """Returns the task with the model's format; ConfigError if pooling or sizes do not fit."""
        options = {n: v for n in _FORM if (v := getattr(self.config, n)) is not None}
        own, reason = _read_format(source, tokenizer, options), "as in the model's modules.json"
        if own is None:
            reason = f"default for {'a decoder' if kind == 'decoder' else 'an encoder'}"
        format_ = replace(own or _default_format(kind), **options)
        end = _get_end(format_.pooling, own, tokenizer, source.name)
        task = replace(self, format=format_, end=end, step_rows=step_rows)
        task.prepare_tokenizer(tokenizer, kind)
        dims = self.config.matryoshka_dims
        if dims and max(dims) > (format_.dims or width):
            raise ConfigError(
                f"--matryoshka-dims {max(dims)}: embeddings of {source.name} have "
                f"{format_.dims or width} dimensions. Use at most that many."
            )
        return task, _describe_format(format_, reason, options)

    def prepare_tokenizer(self, tokenizer: Any, kind: str) -> Choice | None:
        """Make `tokenizer` add EOS (if pooling is "last") and lowercase (if set in `format`)."""
        if self.format.lowercase:
            lowercase(tokenizer)
        if self.end is not None:
            append_end(tokenizer, self.end)
        return None

    @property
    def max_tokens(self) -> int | None:
        return self.format.max_length

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        own = _read_format(source, tokenizer)
        format_ = own or _default_format(kind)
        end = _get_end(format_.pooling, own, tokenizer, source.name)
        values = {"form": asdict(format_), "end": end, "loss": DEFAULT_LOSSES["pairs"]}
        return {"options": {"embedding": values}}

    def inherited_config(
        self, directory: Path, inference_config: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        values = inference_config.get("embedding", {}).get("form")
        format_ = EmbeddingFormat(**values) if values else load_embedding_format(directory)
        return {"embedding": {name: getattr(format_, name) for name in _FORM}} if format_ else {}

    def get_output_format(self, inference_config: Mapping[str, Any], model_config: Any) -> Any:
        from ftlevel.models.kinds import width_of

        return inference_config["embedding"]["form"], width_of(model_config)

    def check_model(self, source: ModelSource, model_config: Any) -> None:
        if get_task_of_texts(source.path, model_config) != self.name:
            raise InputError(f"{source.label} is a reranker. Name an embedding model.")

    def write_files(
        self, directory: Path, model_config: Any, inference_config: Mapping[str, Any]
    ) -> None:
        from ftlevel.models.kinds import max_positions, width_of

        format_ = EmbeddingFormat(**inference_config["embedding"]["form"])
        lengths = [n for n in (format_.max_length, max_positions(model_config)) if n is not None]
        format_ = replace(format_, max_length=min(lengths, default=None))
        save_embedding_format(directory, format_, width_of(model_config))

    def get_heads(self, meta: Any, source: Any) -> tuple[list[str], list[str]]:
        """Returns no modules to train in full, and the poolers that a checkpoint may lack."""
        from ftlevel.models.loading import get_new_poolers

        return [], get_new_poolers(meta, source)

    def get_unused_modules(self, meta: Any) -> list[str]:
        """Returns names of transformers' pooler modules, which embeddings do not use."""
        return [
            name
            for name, module in meta.named_modules()
            if name.rpartition(".")[2] == "pooler" and any(True for _ in module.parameters())
        ]

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        task = self.configured(data_info) if "embedding" in data_info else self
        labels: LabelKind = data_info.get("embedding", {}).get("kind", "ranking")
        config = task.config
        if config.loss is None:
            config = config.model_copy(update={"loss": _default_loss(labels)})
        return Embeddings(METRICS[labels][0], False, config, task.format, labels, task.step_rows)

    def options_for_rows(
        self, options: Mapping[str, Any], examples: Sequence[Any]
    ) -> Mapping[str, Any]:
        """Returns `options`; if `examples` have other labels, with their kind and default loss."""
        values, kind = options["embedding"], _kind_of(examples)
        if values.get("kind") in (kind, "score" if kind == "label" else kind):
            return options
        changes = {"kind": kind, "loss": _default_loss(kind), "scale": None, "margin": None}
        return {**options, "embedding": {**values, **changes}}

    # ---- from columns to encoded rows

    @property
    def encoding_config(self) -> Mapping[str, Any]:
        return {
            "form": asdict(self.format),
            "end": self.end,
            "words": self._with_words,
            "loss": self.config.loss,
            "fields": [each.name for each in fields(EncodedTexts)],
        }

    @property
    def _with_words(self) -> bool:
        return self.config.guide is not None or self.teacher is not None

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode the texts of each row; raises `InputError` for rows that the loss cannot use."""
        if encoder.split == "train":
            kind = _check_examples(examples)
            if kind == "class" and self.step_rows == 1:
                raise InputError(
                    "--per-device-train-batch-size 1: the texts of a step are compared by their "
                    "classes, and a step has one. Use at least 2."
                )
            loss = self.config.loss or _default_loss(kind)
            # Scores of a teacher model are computed after the rows are encoded.
            _check_loss(loss, kind, examples, table, needs_scores=self.teacher is None)
            if kind != "ranking" and (encoder.config.corpus or encoder.config.qrels):
                raise InputError(
                    f"--corpus and --qrels need pairs, and these rows have {_WORDS[kind]}. Drop "
                    "them; ftlevel evaluate RUN --qrels FILE searches with the trained model."
                )
        encode, encoder = self._text_encoder(encoder), encoder.within(self.max_tokens)
        fitted = encoder.fit(encoder.collect(encode, examples), table)
        rows = fitted.rows if encoder.split == "train" else ()
        if len(rows) > 1 and all(row.input_ids == rows[0].input_ids for row in rows):
            raise InputError(
                f"all {len(rows):,} training rows have the same tokens. Use rows with other texts, "
                "or a higher --max-length."
            )
        return fitted

    def _text_encoder(self, encoder: Encoder) -> TextEncoder:
        prompts = self.format.query_prompt, self.format.document_prompt
        is_pooled = self.format.include_prompt
        return TextEncoder(encoder.tokenizer, *prompts, self.end, self._with_words, is_pooled)

    def list_files(self, config: DataConfig) -> list[Path]:
        return [] if config.qrels is None else retrieval_files(config.qrels)

    def with_corpus(self, splits: DatasetSplits, config: DataConfig) -> DatasetSplits:
        if config.qrels is None:
            return replace(splits, corpus=load_corpus(config.corpus)) if config.corpus else splits
        result = load_retrieval_set(config.qrels, config.corpus)
        rows = [
            {
                "query": query,
                "documents": [result.documents[at] for at in grades],
                "labels": [*grades.values()],
            }
            for query, grades in zip(result.queries, result.relevant, strict=True)
        ]
        counts = {
            "documents repeat the text of another one and count once": result.merged,
            "queries without a relevant document are left out": result.unjudged,
        }
        notes = [f"{config.qrels}: {count:,} {what}" for what, count in counts.items() if count]
        notes = [*splits.notes, *notes]
        table = Table(rows, range(1, len(rows) + 1), str(config.qrels), "row")
        return replace(splits, validation=table, corpus=result.documents, notes=notes)

    def encode_corpus(
        self, encoder: Encoder, documents: Sequence[str]
    ) -> tuple[Sequence[Encoded], Choice]:
        texts = self._text_encoder(encoder).documents(documents)
        limit = encoder.limit(self.format.max_length)
        over = sum(len(text.input_ids) > limit for text in texts) if limit else 0
        note = f"{over:,} truncated at {limit:,} tokens" if over else ""
        texts = [text.truncated(limit) for text in texts] if limit and over else texts
        return texts, Choice("corpus", f"{len(texts):,} documents", note)

    def check_eval_set(
        self, training_set: Sequence[Any], eval_set: Sequence[Any], corpus: Sequence[str] | None
    ) -> Sequence[tuple[str, str, Sequence[int], str]]:
        return check_eval_set(training_set, eval_set, corpus)

    def finish_data(
        self, prepared: PreparedData, config: DataConfig, context: EncodingContext
    ) -> PreparedData:
        """Returns `prepared`; for several datasets, its `sets` has each row's dataset index."""
        if not config.also:
            return prepared
        ends = [part.base for part in prepared.table.parts[1:]]
        lines = [prepared.table.lines[row.row] for row in prepared.train]
        sets = [bisect_left(ends, line) for line in lines]
        counts = join_names(f"{count:,}" for _, count in sorted(Counter(sets).items()))
        choice = Choice("steps", "of one dataset each", f"in proportion to their {counts} rows")
        return replace(prepared, sets=sets, choices=[*prepared.choices, choice])

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        kind = _kind_of(loaded.train)
        config = {**self.config.model_dump(mode="json"), "teacher": self.teacher}
        config["loss"] = self.config.loss or _default_loss(kind)
        if unread := [*list_unread("embedding", self.config.changed, config["loss"], PARAMETERS)]:
            raise ConfigError(unread)  # of a default loss, which depends on the rows
        config |= {"form": asdict(self.format), "end": self.end, "kind": kind}
        return {"embedding": {**config, "step_rows": self.step_rows}}

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the embedding settings, with the length at which training truncates texts."""
        values = dict(data_info["embedding"])
        is_set = config.overlong == "truncate" and config.max_length != "auto"
        if is_set or data_info.get("shortened"):
            values["form"] = {**values["form"], "max_length": data_info["max_length"]}
        return {"embedding": values}

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        values = data_info["embedding"]
        details = [
            f"{name.replace('_', ' ')} {values[name]}"
            for name in EMBEDDING_LOSSES[values["loss"]].parameters
            if values[name] not in (None, False)
        ]
        reason = "" if self.config.loss else f"default for {_WORDS[values['kind']]}"
        return [
            Choice("loss", values["loss"], ", ".join([*([reason] if reason else []), *details])),
            Choice("tokens", f"{data_info['tokens']:,} an epoch"),
        ]

    # ---- inference and display

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        raise InputError("an embedding model writes no text. Use ftlevel predict, column query.")

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], options: OutputOptions
    ) -> list[Prediction]:
        """Returns the embedding of each query or document, with the model's prompt before it."""
        from torch.nn import functional

        values = self.configured(model.options)
        format_ = values.format
        normalize = format_.normalize if options.normalize is None else options.normalize
        format_ = replace(format_, dims=options.dims or format_.dims, normalize=normalize)
        # The options normalize what is left after truncation; the model's own format does not.
        rescales = normalize and (options.normalize or options.dims)
        end, is_pooled = values.end, format_.include_prompt
        encode = TextEncoder(model.tokenizer, "", "", end, include_prompt=is_pooled)
        texts = [
            replace(q, query=q.documents[0], documents=(), prompt=format_.document_prompt)
            if q.documents
            else replace(q, prompt=q.prompt or format_.query_prompt)
            for q in queries
        ]
        rows: list[EncodedText] = [text for row in encode(texts) for text in row.sequences]  # type: ignore[misc]
        objective = Embeddings(METRICS["ranking"][0], format=format_)

        def read(
            batch: Sequence[Any], states: torch.Tensor, mask: torch.Tensor
        ) -> list[Prediction]:
            unpooled = [row.unpooled for row in batch]
            vectors = objective.embed_states(states, without_first(mask, unpooled))
            if rescales:
                vectors = functional.normalize(vectors, dim=-1)
            return [Prediction("", columns={"": vector}) for vector in vectors.cpu().numpy()]

        return model.score_batches(rows, read)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return 0

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic pair: a query with an eighth of `ids`, a document with all."""
        query = ids[: max(1, len(ids) // 8)]
        return EncodedTexts(query + ids, (1.0,), row, {}, (len(query), len(ids)), (), (0, 0))

    def decode_targets(
        self, row: Any, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns a text's name for its first pooled token, "" for others, None for unpooled."""
        shown: list[str | None] = []
        for number, (size, prompt) in enumerate(zip(row.sizes, row.prompts, strict=True)):
            first = 0 if self.format.include_prompt else min(prompt, size - 1)
            positions = {"cls": (first,), "last": (size - 1,)}
            pooled = positions.get(self.format.pooling, range(first, size))
            own: list[str | None] = ["" if at in pooled else None for at in range(size)]
            name = "query" if not number else f"document {number}"
            own[pooled[0]] = f"{name}, prompt" if prompt and self.format.include_prompt else name
            shown += own
        return shown

    def decode_label(self, row: Any, names: Sequence[str]) -> str:
        ends, begin, parts = [], 0, []
        for size in row.sizes:
            ends.append((begin + 1, begin + size))
            begin += size
        details = ["query", *(f"document with label {label:g}" for label in row.labels)]
        for (first, last), prompt, what in zip(ends, row.prompts, details, strict=False):
            within = f", prompt to {first + prompt - 1}" if prompt else ""
            parts.append(f"{what}: tokens {first}-{last}{within}")
        return "; ".join(parts)


_WORDS = {"ranking": "pairs", "score": "scores", "label": "labels", "class": "classes"}


_UNLIMITED = 10**6
"""Lengths of tokenizers that are larger mean that there is no limit."""


def _read_format(
    source: ModelSource, tokenizer: Any, replaced: Collection[str] = ()
) -> EmbeddingFormat | None:
    """Returns `source`'s sentence-transformers format, or None; ignores the settings `replaced`."""
    path = download_files(source, FILES)
    format_ = None if path is None else load_embedding_format(path, replaced)
    if format_ is None:
        return None
    longest = format_.max_length or tokenizer.model_max_length
    return replace(
        format_,
        max_length=longest if longest < _UNLIMITED else None,
        lowercase=format_.lowercase and keeps_case(tokenizer),
    )


def _default_format(kind: str) -> EmbeddingFormat:
    return EmbeddingFormat("last" if kind == "decoder" else "mean", normalize=True)


def _get_end(pooling: str, own: EmbeddingFormat | None, tokenizer: Any, name: str) -> int | None:
    """Returns EOS if "last" is pooled; None if the model's `own` format pools what it adds."""
    if pooling != "last" or (own and own.pooling == "last"):
        return None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"--pooling last: the tokenizer of {name} has no EOS token, whose state is the "
            "embedding. Set eos_token in its tokenizer_config.json, or use --pooling mean."
        )
    return int(tokenizer.eos_token_id)


def _describe_format(
    format_: EmbeddingFormat, reason: str, options: Mapping[str, Any]
) -> list[Choice]:
    def why(*names: str) -> str:
        flags = [f"--{name.replace('_', '-')}" for name in names if name in options]
        return join_names(flags) if flags else reason

    normalized = "normalized" if format_.normalize else "not normalized"
    choices = [
        Choice("pooling", f"{format_.pooling}, {normalized}", why("pooling", "normalize")),
        Choice("similarity", format_.similarity, why("similarity")),
    ]
    for name, text in (("query", format_.query_prompt), ("document", format_.document_prompt)):
        if text:
            details = why(f"{name}_prompt") + ("" if format_.include_prompt else "; not pooled")
            choices.append(Choice(f"{name} prompt", repr(text), details))
    return choices


def _default_loss(kind: LabelKind) -> str:
    if kind == "class":
        return "contrastive"
    return DEFAULT_LOSSES["pairs" if kind == "ranking" else "scores"]


def _kind_of(examples: Sequence[EmbeddingRow]) -> LabelKind:
    kind = examples[0].kind
    if kind != "score":
        return kind
    return "label" if {label for e in examples for label in e.labels} <= {0.0, 1.0} else "score"


def _check_examples(examples: Sequence[EmbeddingRow]) -> LabelKind:
    kind = _kind_of(examples)
    if any(e.kind != examples[0].kind for e in examples):
        raise InputError("some rows have a score and others do not. Use one layout for all rows.")
    if kind in ("score", "label"):
        if (
            len(labels := {label for e in examples for label in e.labels}) == 1
            and len(examples) > 1
        ):
            raise InputError(
                f"the label of all {len(examples):,} rows is {labels.pop():g}, which teaches "
                f"nothing. Use different labels, or drop the column for --loss mnrl."
            )
    elif kind == "class":
        if len({e.group for e in examples}) == 1:
            raise InputError(
                f"the class of all {len(examples):,} rows is {examples[0].group!r}, which "
                f"teaches nothing. Use rows of several classes."
            )
    elif all(set(e.positives) == {e.query} for e in examples):
        raise InputError(
            "the positive of every row equals its query, which teaches nothing. Set the column "
            "of the documents: --map positive=COLUMN."
        )
    return kind


def _check_loss(
    loss: str,
    kind: LabelKind,
    examples: Sequence[EmbeddingRow],
    table: Table,
    *,
    needs_scores: bool,
) -> None:
    """Raise `InputError` if `examples` lack what `loss` needs; teacher scores if `needs_scores`."""
    properties = EMBEDDING_LOSSES[loss]
    wants = "pairs" if kind == "ranking" else "scores"
    if properties.columns != wants:
        usable = [name for name, other in EMBEDDING_LOSSES.items() if other.columns == wants]
        raise InputError(
            f"--loss {loss} needs {properties.columns}, and these rows have {_WORDS[kind]}. Use "
            f"--loss {join_names(usable, 9)}."
        )
    low, high = properties.label_range or (-math.inf, math.inf)
    for row, label in ((e.row, label) for e in examples for label in e.labels):
        if not low <= label <= high:
            raise InputError(
                f"{table.where(row)}: the score is {label:g}, and --loss {loss} needs scores from "
                f"{low:g} to {high:g}. Scale them, or use --loss cosent."
            )
    without = [e.row for e in examples if kind == "ranking" and not e.positives]
    if without and not properties.needs_teacher:
        raise InputError(
            f"{table.where(without[0])}: no document has a label above 0, as in {len(without):,} "
            f"of {len(examples):,} rows; --loss {loss} needs a relevant one. Remove these rows."
        )
    if loss == "mnrl":
        texts = {"document": {text for e in examples for text in e.documents}}
        if not any(example.negatives for example in examples):
            texts["query"] = {example.prompt + example.query for example in examples}
        if single := [name for name, distinct in texts.items() if len(distinct) == 1]:
            raise InputError(
                "--loss mnrl learns from documents of other rows as negatives, and the data has "
                f"one {single[0]}. Use rows with several."
            )
    for example in examples if properties.needs_negatives else ():
        if not example.negatives:
            raise InputError(
                f"{table.where(example.row)}: --loss {loss} needs a negative in every row. Add a "
                "column negative, with ftlevel mine for one, or use --loss mnrl."
            )
    for example in examples if properties.needs_teacher and needs_scores else ():
        if not example.teacher:
            raise InputError(
                f"{table.where(example.row)}: --loss {loss} needs a teacher's score of every "
                "document. Add a column label with a list of them, or --teacher MODEL."
            )


TASKS = (
    EmbeddingTask(
        name="embedding",
        shapes=EMBEDDING_SHAPES,
        auto_classes={"encoder": "AutoModel", "decoder": "AutoModel"},
        peft_types={"encoder": "FEATURE_EXTRACTION", "decoder": "FEATURE_EXTRACTION"},
        headline="ndcg@10",
        query_shapes=QUERY_SHAPES,
    ),
)
