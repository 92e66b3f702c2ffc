"""Token classification: a tag for each word, as in named entity recognition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.encoding.tags import encode_tagged, encode_words, find_orphans
from ftlevel.data.formats.detect import Format, Shape
from ftlevel.data.formats.examples import build_tagged
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.sources.table import BadRow, Table
from ftlevel.task import Meter, Objective
from ftlevel.tasks.base import BaseTask, PromptedModel, Reply, Speller
from ftlevel.tasks.classes import read_labels
from ftlevel.tasks.entities import are_entity_tags, score_entities
from ftlevel.tasks.pairs import Pairs

if TYPE_CHECKING:
    import torch

    from ftlevel.data.encoding.fit import Fitted
    from ftlevel.data.prepare.encoder import Encoder

_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TagTask(BaseTask):
    """A task whose target is a tag for each word."""

    has_new_head: ClassVar[bool] = True
    needs_offsets: ClassVar[bool] = True

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Return the cross entropy of the words' tags."""
        return Tags(self.headline, names=tuple(facts.get("labels", ())))

    def stand_in(self, model_config: Any, tokenizer: Any, kind: str) -> dict[str, Any]:
        """Return the tags that the model's config names."""
        return {"labels": read_labels(model_config)}

    def label_role(self, format_: Format) -> str | None:
        """Return `tags`."""
        return "tags"

    def find_faults(self, examples: Sequence[Any], labels: LabelSet, table: Table) -> list[BadRow]:
        """Return the rows whose tags break BIO."""
        return find_orphans(examples, labels.names, table)

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
        """Return sentences with the tag of each word at its first token."""
        labels = encoder.labels
        if labels is None:
            raise TypeError("tags have a label set")

        def encode(some: Sequence[Any]) -> list[Encoded]:
            return encode_tagged(encoder.tokenizer, some, labels)

        return encoder.fit(encoder.collect(encode, examples), table)

    def answer(
        self, model: PromptedModel, prompts: Sequence[str], context: str | None
    ) -> list[Reply]:
        """Return each text with its words' tags."""
        sentences = [_WORDS.findall(text) or [text] for text in prompts]
        ids, extras, positions = encode_words(model.tokenizer, sentences)
        rows = [
            Encoded(tokens, [IGNORED] * len(tokens), i, more)
            for i, (tokens, more) in enumerate(zip(ids, extras, strict=True))
        ]
        replies = []
        for words, first, logits in zip(sentences, positions, model.score(rows), strict=True):
            best = logits.argmax(-1).tolist()
            tags = ["O" if at is None else model.labels[best[at]] for at in first]
            shown = [w if tag == "O" else f"{w}/{tag}" for w, tag in zip(words, tags, strict=True)]
            replies.append(Reply(" ".join(shown), {}, list(zip(words, tags, strict=True))))
        return replies

    def probe_labels(self, ids: Sequence[int], labels: Sequence[str], options: Any) -> Any:
        """Return the first tag for each token."""
        return [0] * len(ids)

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, speller: Speller
    ) -> list[str | None]:
        """Return the tag at the first token of each word."""
        shown = super().show_targets(row, names, kind, speller)
        labels = row.labels if isinstance(row.labels, list) else []
        return [None if at is None else names[tag] for at, tag in zip(shown, labels, strict=True)]


@dataclass(frozen=True)
class Tags(Objective):
    """Cross entropy over words: logits `(batch, seq, tags)`, labels `(batch, seq)`."""

    one_of_many: ClassVar[bool] = True
    names: tuple[str, ...] = ()

    def choices(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of the words, `(words, tags)`."""
        return logits[labels != IGNORED]

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the negative log likelihoods of the words' tags, in nats."""
        from torch.nn import functional

        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def meter(self) -> Meter:
        """Return a `TagMeter`."""
        return TagMeter(self.names)


class TagMeter(Pairs):
    """Entity precision, recall and F1 where the tags mark entities, else macro F1; accuracy.

    Every word counts: one that has no token is predicted as `O`, or wrongly where there is no `O`.

    Args:
        names: of the tags, by number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch of `TaggedRow`: logits `(batch, seq, tags)`."""
        best = logits.argmax(-1).tolist()
        for tags, row in zip(best, rows, strict=True):
            self.true.append([self.names[tag] for tag in row.tags])
            self.predicted.append(
                ["O" if at is None else self.names[tags[at]] for at in row.positions]
            )

    def compute(self, loss: float) -> dict[str, float]:
        """Return the scores, and the accuracy over words."""
        from sklearn.metrics import f1_score

        true = [tag for tags in self.true for tag in tags]
        predicted = [tag for tags in self.predicted for tag in tags]
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        if are_entity_tags(self.names):
            scores = score_entities(self.true, self.predicted)
        else:
            scores = {"f1": float(f1_score(true, predicted, average="macro", zero_division=0))}
        return {**scores, "accuracy": right / len(true)}


_CLASS = "AutoModelForTokenClassification"

TASKS = (
    TagTask(
        name="token-classification",
        shapes=(
            Shape(
                "tokens + tags",
                build_tagged,
                {
                    "tokens": ("tokens", "words"),
                    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
                },
            ),
        ),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
        peft_types={"encoder": "TOKEN_CLS", "decoder": "TOKEN_CLS", "encoder-decoder": "TOKEN_CLS"},
        headline="f1",
    ),
)
