"""Rerankers: a model that scores documents for a query."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.detect import Format
from ftlevel.data.sources.table import Table
from ftlevel.errors import ConfigError, InputError, has_no_effect
from ftlevel.extras.retrieval.config import RERANKING_LOSSES, RerankingConfig
from ftlevel.extras.retrieval.embedding import RetrievalTask
from ftlevel.extras.retrieval.formats import CANDIDATE_SHAPES, RANKING_SHAPES, EmbeddingRow
from ftlevel.extras.retrieval.pairs import PairEncoder, RankedRow
from ftlevel.extras.retrieval.reranking_losses import Ranking, get_loss_config
from ftlevel.extras.retrieval.sentence_transformers import (
    FILES,
    CrossEncoderFormat,
    check_cross_encoder,
    load_activation,
    save_cross_encoder_format,
    scores_by_tokens,
)
from ftlevel.models.sources import ModelSource, download_files
from ftlevel.objectives import Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    check_options,
)

if TYPE_CHECKING:
    import torch

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData

SIGMOID = "torch.nn.modules.activation.Sigmoid"
IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class RerankingTask(RetrievalTask):
    """Task of a model with one score per pair of query and document."""

    config: RerankingConfig = field(default_factory=RerankingConfig)
    max_length: int | None = None  # of truncated training rows

    predicts_training_rows: ClassVar[bool] = False
    has_new_head: ClassVar[bool] = True
    hooks: ClassVar[str] = "ftlevel.extras.retrieval.hooks:RetrievalHooks"
    exporter: ClassVar[str] = "ftlevel.extras.retrieval.export:RerankingExporter"
    served_as: ClassVar[str] = "rerankers"
    finds_ends_by_padding: ClassVar[bool] = True
    head_like: ClassVar[str] = "text-classification"
    separates_padding: ClassVar[bool] = True
    synthetic_info: ClassVar[Mapping[str, Any]] = {
        "problem_type": "regression",
        "reranking": {"loss": "lce", "pos_weight": 1.0, "headline": "ndcg@10"},
    }

    def configured(self, task_config: Mapping[str, Any]) -> RerankingTask:
        values = get_loss_config(task_config)
        fields = {name: values[name] for name in RerankingConfig.model_fields if name in values}
        return replace(
            self,
            config=RerankingConfig(**fields),
            teacher=values.get("teacher"),
            max_length=values.get("max_length"),
        )

    @property
    def max_tokens(self) -> int | None:
        return self.max_length

    def for_model(
        self, source: ModelSource, kind: str, width: int, tokenizer: Any, step_rows: int
    ) -> tuple[BaseTask, list[Choice]]:
        directory = download_files(source, FILES)
        if directory is not None and scores_by_tokens(directory):
            raise ConfigError(
                f"{source.name} scores documents by the logits of two tokens, such as yes and no, "
                "and --task reranking trains a head with one score. Name its base model, or a "
                "copy that was converted to ForSequenceClassification."
            )
        return self, []

    @property
    def encoding_config(self) -> Mapping[str, Any]:
        return {"reranking": {**self.config.model_dump(), "teacher": self.teacher}}

    def prepare_tokenizer(self, tokenizer: Any, kind: str) -> Choice | None:
        """Make a decoder's `tokenizer` encode pairs; InputError without EOS, or if it is slow."""
        if kind != "decoder":
            return None
        from tokenizers.processors import TemplateProcessing

        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has no EOS token, at which a decoder "
                "reads the score. Set eos_token in its tokenizer_config.json."
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} is not a fast tokenizer and cannot "
                "mark where a document begins. Convert it to tokenizer.json."
            )
        bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        start = "bos:0 " if bos else ""
        special_tokens = [("newline", newline), ("eos", tokenizer.eos_token_id)]
        special_tokens += [("bos", tokenizer.bos_token_id)] if bos else []
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start}$A:0",
            pair=f"{start}$A:0 newline:0 $B:1 eos:1",
            special_tokens=special_tokens,
        )
        return Choice("pair", "query, newline, document, EOS", "a decoder's score is read at EOS")

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        values = get_loss_config(data_info)
        return Ranking(values["headline"], loss=values["loss"], pos_weight=values["pos_weight"])

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        return {
            "problem_type": "regression",
            "reranking": resolve_loss(self.config, loaded.train, self.teacher),
        }

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        values = get_loss_config(data_info)
        reason = "several documents per query" if values["listed"] else "one document per query"
        reason = "" if self.config.loss else f"{'--teacher; ' if self.teacher else ''}{reason}"
        lines = [Choice("loss", values["loss"], reason)]
        if values["loss"] == "bce":
            why = "" if self.config.pos_weight else "irrelevant documents per relevant one"
            lines.append(Choice("positive weight", f"{values['pos_weight']:.3g}", why))
        documents = sum(len(example.documents) for example in loaded.train)
        queries = len({example.query for example in loaded.train})
        counts = Choice("documents", f"{documents:,}", f"of {queries:,} queries")
        return [*lines, counts, Choice("tokens", f"{data_info['tokens']:,} an epoch")]

    def inference_config(self, config: Any, data_info: Mapping[str, Any]) -> dict[str, Any]:
        """Returns problem type, loss settings, and the length that rows were truncated to."""
        values = dict(data_info["reranking"])
        if data_info.get("shortened"):
            values["max_length"] = data_info["max_length"]
        return {"problem_type": "regression", "reranking": values}

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns the options; InputError for another head, several labels or activations."""
        if model_config.num_labels != 1:
            name = (getattr(model_config, "architectures", None) or [""])[0]
            if name and not name.endswith("ForSequenceClassification"):
                raise InputError(
                    f"{source.name} is a {name}, which has no head that scores documents. Train "
                    "one with ftlevel train --task reranking. Rerankers that answer with the "
                    "tokens yes and no are not supported."
                )
            raise InputError(
                f"a reranker has one score, and this model has {model_config.num_labels} classes. "
                "Name another, or --task text-classification."
            )
        directory = download_files(source, FILES)
        if directory is not None:
            check_cross_encoder(directory)
        activation = load_activation(directory, model_config) if directory else None
        name = (activation or SIGMOID).rpartition(".")[2]
        if name not in ("Identity", "Sigmoid"):
            raise InputError(
                f"{source.name} converts its score by {name}; supported are Identity and Sigmoid. "
                "Load it with sentence-transformers."
            )
        return {
            "options": {
                "problem_type": "regression",
                "reranking": {
                    "loss": "lce" if name == "Identity" else "bce",
                    "pos_weight": 1.0,
                    "headline": "ndcg@10",
                },
            }
        }

    def write_files(
        self, directory: Path, model_config: Any, inference_config: Mapping[str, Any]
    ) -> None:
        from ftlevel.models.kinds import max_positions

        values = get_loss_config(inference_config)
        activation = SIGMOID if values["loss"] == "bce" else IDENTITY
        pad_id = getattr(model_config, "pad_token_id", None)
        max_length = values.get("max_length") or max_positions(model_config)
        save_cross_encoder_format(directory, CrossEncoderFormat(activation, max_length, pad_id))

    # ---- rows

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        encode = PairEncoder(encoder.tokenizer, has_teacher=self.teacher is not None)
        encoder = encoder.within(self.max_tokens)
        return encoder.fit(encoder.collect(encode, examples), table)

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic row: a quarter of `ids` as query, the rest as two documents."""
        query = len(ids) // 4
        size = len(ids) - query
        return RankedRow(ids + ids[query:], 0, row, {}, query, (size, size), (1.0, 0.0), (1.0, 0.0))

    def decode_label(self, row: Any, names: Sequence[str]) -> str:
        shown, start = [f"query: tokens 1-{row.query}"], row.query
        for size, label in zip(row.sizes, row.relevance, strict=True):
            shown.append(f"document with label {label:g}: {start + 1}-{start + size}")
            start += size
        return ", ".join(shown)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        """Returns the labels of one document: relevance, teacher's score, and list size 1."""
        return 0.0, 0.0, 1.0

    def head_signature(self, labels: Sequence[str]) -> str:
        return "a relevance score"

    # ---- inference

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        raise InputError(
            "a reranker scores documents for a query. Use ftlevel predict, with columns query and "
            "document."
        )

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        options: OutputOptions,
    ) -> dict[str, Column]:
        check_options(options, "a reranker", "")
        return {"": "numbers" if "documents" in format_.columns else "number"}

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], options: OutputOptions
    ) -> list[Prediction]:
        """Returns the scores of each query's documents; probabilities if trained with bce."""
        is_bce = get_loss_config(model.options)["loss"] == "bce"
        scores = self.score_documents(model, queries, as_probabilities=is_bce)
        found = []
        for question, own in zip(queries, scores, strict=True):
            value = own[0] if question.kind == "score" else own
            text = ", ".join(f"{score:.4g}" for score in own)
            found.append(Prediction(text, columns={"": value}))
        return found

    def score_documents(
        self, model: PromptedModel, queries: Sequence[Any], *, as_probabilities: bool = False
    ) -> list[list[float]]:
        """Returns the documents' scores per query: logits, or sigmoids of the logits."""
        rows = [
            Encoded(sequence.input_ids, 0, row.row, sequence.extras)
            for row in model.fit_rows(PairEncoder(model.tokenizer)(queries))
            for sequence in row.sequences
        ]

        def read(_: Encoded, logits: torch.Tensor) -> float:
            score = logits.float().reshape(-1)[0]
            return float(score.sigmoid() if as_probabilities else score)

        scores = iter(model.score(rows, read))
        return [[next(scores) for _ in query.documents] for query in queries]


def resolve_loss(
    config: RerankingConfig, examples: Sequence[EmbeddingRow], teacher: str | None
) -> dict[str, Any]:
    """Returns `loss`, `pos_weight` (of relevant documents), `headline`, `listed` and `teacher`.

    `headline` is the main metric, `listed` whether a query has documents with different labels.
    `teacher` is the name of a model that will score the documents. Raises `InputError` if the
    labels do not fit the loss, or are all equal.
    """
    labels = Counter(label for example in examples for label in example.labels)
    contrasts = sum(len(set(example.labels)) > 1 for example in examples)
    usual = ("margin-mse", "mse") if teacher else ("lce", "bce")
    loss = config.loss or usual[0 if contrasts else 1]
    if config.pos_weight is not None and loss != "bce":
        raise ConfigError(has_no_effect("--pos-weight", f"--loss {loss}", "it is for bce"))
    if len(labels) == 1 and not (teacher and loss == "mse"):
        relevant = next(iter(labels)) > 0
        advice = "Add negatives with ftlevel mine." if relevant else "Label relevant ones with 1."
        raise InputError(
            f"all documents have label {next(iter(labels)):g}, and a reranker needs relevant and "
            f"irrelevant documents. {advice}"
        )
    properties = RERANKING_LOSSES[loss]
    if properties.is_binary:
        without = sum(len({label > 0 for label in e.labels}) < 2 for e in examples)
        if without and contrasts == len(examples):
            raise InputError(
                f"--loss {loss} compares documents with labels above 0 with others, and "
                f"{without:,} of {len(examples):,} rows have only one of the two. For grades, use "
                "--loss lambda, listnet or ranknet."
            )
    if properties.is_listwise and contrasts < len(examples):
        raise InputError(
            f"--loss {loss} compares the documents of a query, and {len(examples) - contrasts:,} "
            f"of {len(examples):,} rows have no documents of different relevance. Use --loss bce, "
            "or add a relevant and an irrelevant document to each query."
        )
    if properties.is_bounded and not all(0 <= label <= 1 for label in labels):
        worst = max(labels, key=lambda label: abs(label - 0.5))
        raise InputError(
            f"--loss {loss} needs labels from 0 to 1, found {worst:g}. Use --loss lambda or mse."
        )
    if properties.needs_teacher and not (teacher or all(example.teacher for example in examples)):
        raise InputError(
            f"--loss {loss} needs teacher scores, and the rows have none. Add --teacher MODEL, or "
            f"a column label with a score for each document, or use --loss lce."
        )
    good = sum(count * label for label, count in labels.items() if 0 <= label <= 1)
    balance = (labels.total() - good) / good if good else 1.0
    kinds = defaultdict[str, set[bool]](set)
    for example in examples:
        kinds[example.prompt + example.query] |= {label > 0 for label in example.labels}
    ranked = any(len(both) == 2 for both in kinds.values())
    graded = not labels.keys() <= {0.0, 1.0}
    return {
        "loss": loss,
        "pos_weight": config.pos_weight or (balance if loss == "bce" else 1.0),
        "headline": "ndcg@10" if ranked else "spearman" if graded else "average_precision",
        "listed": bool(contrasts),
        "teacher": teacher,
    }


_CLASS = "AutoModelForSequenceClassification"

TASKS = (
    RerankingTask(
        name="reranking",
        shapes=RANKING_SHAPES,
        query_shapes=CANDIDATE_SHAPES,
        auto_classes={"encoder": _CLASS, "decoder": _CLASS},
        peft_types={"encoder": "SEQ_CLS", "decoder": "SEQ_CLS"},
        headline="ndcg@10",
    ),
)
