"""Token classification: one tag per word, and entity metrics as in conlleval and seqeval.

The metrics are implemented here because seqeval is unmaintained since 2020 and has no wheel; tests
compare with its results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.encoding.spans import encode_tagged, encode_words, get_invalid_bio_tags
from ftlevel.data.formats.detect import Format, FormatSpec, RoleValues
from ftlevel.data.formats.examples import TaggedTokens, create_tagged_tokens
from ftlevel.data.formats.labels import LabelSet, create_tagged_words, split_words
from ftlevel.data.formats.turns import UnusableRowError, check_text
from ftlevel.data.sources.table import BadRow, Row, Table
from ftlevel.objectives import Meter, Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    TokenDecoder,
    check_options,
)
from ftlevel.tasks.classes import read_labels
from ftlevel.tasks.losses import ClassObjective, PredictionMeter, entropy

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


_TAG = re.compile(r"O|[BIESLU]-.+")
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")

Entity = tuple[str, int, int]
"""(type, first word, last word)."""


def are_entity_tags(names: Iterable[str]) -> bool:
    """Returns whether all `names` belong to a scheme such as BIO, BIOES or BILOU."""
    names = set(names)
    return all(_TAG.fullmatch(name) for name in names) and bool(names - {"O"})


def name_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """Returns the tagging scheme of sentences of tags: IO, IOB1, IOB2, IOBES or BILOU.

    In IOB1 (Ramshaw and Marcus, 1995) B- starts an entity only after another of the same type; in
    IOB2 every entity starts with B-.
    """
    letters: set[str] = set()
    opens_anew = False  # B- where IOB1 has I-
    for tags in sentences:
        previous = "O"
        for tag in tags:
            letters.add(tag[0])
            opens_anew = opens_anew or (tag[0] == "B" and previous[2:] != tag[2:])
            previous = tag
    if letters & {"L", "U"}:
        return "BILOU"
    if letters & {"E", "S"}:
        return "IOBES"
    if "B" not in letters:
        return "IO"
    return "IOB2" if opens_anew else "IOB1"


def extract_entities(tags: Sequence[str]) -> list[Entity]:
    """Returns (type, first word, last word) per entity; as in conlleval, I- may begin one."""
    entities: list[Entity] = []
    start, previous, previous_type = 0, "O", ""
    for index, name in enumerate([*tags, "O"]):
        tag, _, type_ = name.partition("-")
        changed = type_ != previous_type
        in_entity = previous != "O"
        if in_entity and (previous in _ENDS or tag in _BEGINS or tag == "O" or changed):
            entities.append((previous_type, start, index - 1))
            in_entity = False
        if tag != "O" and not in_entity:
            start = index
        previous, previous_type = tag, type_
    return entities


def score_entities(
    true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns micro-averaged precision, recall and F1 over entities, between 0 and 1."""
    right = expected = predicted_count = 0
    for tags, guesses in zip(true, predicted, strict=True):
        entities, guessed = set(extract_entities(tags)), set(extract_entities(guesses))
        right += len(entities & guessed)
        expected += len(entities)
        predicted_count += len(guessed)
    precision = right / predicted_count if predicted_count else 0.0
    recall = right / expected if expected else 0.0
    total = precision + recall
    f1 = 2 * precision * recall / total if total else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


@dataclass(frozen=True)
class TagTask(BaseTask):
    """Task with one tag per word."""

    has_new_head: ClassVar[bool] = True
    synthetic_labels: ClassVar[tuple[str, ...]] = ("O", "B-X", "I-X")
    needs_offsets: ClassVar[bool] = True

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        return Encoded(ids, [0] * len(ids), row)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        return Tags(self.headline, names=tuple(data_info.get("labels", ())))

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        return {"labels": read_labels(model_config)}

    def label_role(self, format_: Format) -> str | None:
        return "tags" if "tags" in format_.columns else "spans"

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        names = loaded.labels.names if loaded.labels else ()
        choices = super().describe_rows(loaded, data_info)
        if not are_entity_tags(names):
            return choices
        scheme = name_scheme(
            [names[tag] if isinstance(tag, int) else tag for tag in example.tags]
            for example in loaded.train
        )
        reason = "made of the spans" if "spans" in loaded.format.columns else "as in the data"
        return [*choices, Choice("tags", scheme, reason)]

    def get_inconsistent_labels(
        self, examples: Sequence[Any], labels: LabelSet, table: Table
    ) -> list[BadRow]:
        return get_invalid_bio_tags(examples, labels.names, table)

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode sentences; the first token of each word has its tag as label."""
        labels = encoder.labels
        if labels is None:
            raise TypeError("tags have a label set")
        encode = partial(encode_tagged, encoder.tokenizer, labels=labels)
        return encoder.fit(encoder.collect(encode, examples), table)

    def get_query_format(
        self,
        column_names: Sequence[str],
        mapping: Mapping[str, str],
        name: str | None = None,
        rows: Sequence[Row] = (),
    ) -> Format:
        """Returns the format of a table, ignoring Prodigy's `tokens` column of objects."""
        tokens = next((row["tokens"] for row in rows if row.get("tokens")), None)
        if isinstance(tokens, list) and isinstance(tokens[0], dict) and "tokens" not in mapping:
            column_names = [column for column in column_names if column != "tokens"]
        return super().get_query_format(column_names, mapping, name, rows)

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        check_options(
            replace(outputs, probabilities=False),
            f"a word of --task {self.name}",
            "Use --probabilities, which gives that of each word's tag.",
        )
        columns: dict[str, Column] = {"": "texts"}
        if "text" in format_.columns:
            columns["words"] = "texts"
        if outputs.probabilities:
            columns["probability"] = "numbers"
        return columns

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        return _split(prompt, number)

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        ids, extras, positions = encode_words(model.tokenizer, [q.tokens for q in queries])
        rows = [
            Encoded(tokens, [IGNORED] * len(tokens), i, extra)
            for i, (tokens, extra) in enumerate(zip(ids, extras, strict=True))
        ]

        # A word without tokens has no tag, unless a tag means "outside".
        outside = "O" if "O" in model.labels or are_entity_tags(model.labels) else None

        def read(row: Encoded, logits: Tensor) -> Prediction:
            words, first = queries[row.row].tokens, positions[row.row]
            best = logits.argmax(-1).tolist()
            tags = [outside if at is None else model.labels[best[at]] for at in first]
            pairs = list(zip(words, tags, strict=True))
            columns: dict[str, Any] = {}
            if outputs.probabilities:
                shares = logits.float().softmax(-1).amax(-1).tolist()
                columns["probability"] = [None if at is None else shares[at] for at in first]
            return Prediction(
                " ".join(word if tag in ("O", None) else f"{word}/{tag}" for word, tag in pairs),
                {},
                pairs,
                {"": tags, "words": list(words), **columns},
            )

        return model.score(rows, read)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return [0] * len(ids)

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns the tag at the first token of each word."""
        targets = super().decode_targets(row, names, kind, decoder)
        labels = row.labels if isinstance(row.labels, list) else []
        return [None if at is None else names[tag] for at, tag in zip(targets, labels, strict=True)]


def create_words(values: RoleValues) -> TaggedTokens:
    """Create an example without tags, from a list of words, its JSON, or a text."""
    if "text" in values:
        return _split(values.text("text"), values.index)
    words, column = values.get("tokens"), repr(values.columns["tokens"])
    if type(words) is not list or not words:
        raise UnusableRowError(f"{column} is not a list of words, or JSON of one")
    return TaggedTokens(
        tuple(check_text(word, f"word {i} of {column}") for i, word in enumerate(words, 1)),
        (),
        values.index,
    )


def _split(text: str, row: int) -> TaggedTokens:
    return TaggedTokens(tuple(text[a:b] for a, b in split_words(text)) or (text,), (), row)


@dataclass(frozen=True)
class Tags(ClassObjective):
    """Objective: cross entropy of words, logits `(batch, seq, tags)`, labels `(batch, seq)`."""

    per_token: ClassVar[bool] = True
    names: tuple[str, ...] = ()

    def choices(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return logits[labels != IGNORED]

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics: F1 and accuracy; for entity tags, also precision and recall."""
        entity_metrics = ("precision", "recall") if are_entity_tags(self.names) else ()
        return (*entity_metrics, "f1", "accuracy")

    def meter(self) -> Meter:
        return TagMeter(self.names)

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Returns the entropy of the tag frequencies, the loss of always predicting these."""
        labels = (row.labels for row in rows if isinstance(row.labels, list))
        return entropy(tag for tags in labels for tag in tags if tag != IGNORED)


class TagMeter(PredictionMeter):
    """Meter: accuracy, entity F1 (macro F1 for other tags); a word without tokens is `O`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        for tags, row in zip(logits.argmax(-1).tolist(), rows, strict=True):
            self.true.append([self.names[tag] for tag in row.tags])
            self.predicted.append(
                ["O" if at is None else self.names[tags[at]] for at in row.positions]
            )

    def compute(self, loss: float) -> dict[str, float]:
        from sklearn.metrics import f1_score

        true = [tag for tags in self.true for tag in tags]
        predicted = [tag for tags in self.predicted for tag in tags]
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        if are_entity_tags(self.names):
            scores = score_entities(self.true, self.predicted)
        else:
            names = sorted({*true, *predicted} & {*self.names})  # without that of missing words
            f1 = f1_score(true, predicted, labels=names, average="macro", zero_division=0)
            scores = {"f1": float(f1)}
        return {**scores, "accuracy": right / len(true)}


_CLASS = "AutoModelForTokenClassification"
_TEXT = ("text", "sentence", "content", "body")

TASKS = (
    TagTask(
        name="token-classification",
        shapes=(
            FormatSpec(
                "tokens + tags",
                create_tagged_tokens,
                {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "labels")},
            ),
            FormatSpec(
                "text + spans",
                create_tagged_words,
                {"text": _TEXT, "spans": ("spans", "entities", "label", "labels")},
            ),
        ),
        query_shapes=(
            FormatSpec("tokens", create_words, {"tokens": ("tokens", "words")}),
            FormatSpec("text", create_words, {"text": _TEXT}),
        ),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
        peft_types={"encoder": "TOKEN_CLS", "decoder": "TOKEN_CLS", "encoder-decoder": "TOKEN_CLS"},
        headline="f1",
    ),
)
