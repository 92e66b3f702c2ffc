"""Masked language modeling: an encoder predicts masked tokens of its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import PLAIN_TEXT, PlainText
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError, UnansweredError
from ftlevel.objectives import Checks, Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    TokenDecoder,
    check_options,
    rank,
)
from ftlevel.tasks.losses import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.collate import MaskedRows
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder, EncodingContext, PreparedData

_MASK = "[MASK]"


@dataclass(frozen=True)
class MaskTask(BaseTask):
    """Task of masked language modeling."""

    needs_offsets: ClassVar[bool] = True
    predicts_training_rows: ClassVar[bool] = False  # they have no mask token
    checks: ClassVar[Checks] = Checks(supervised=False)  # tokens are masked later

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic row of tokens `ids` with every sixth token masked."""
        labels = [token if at % 6 == 0 else IGNORED for at, token in enumerate(ids)]
        return Encoded(ids, labels, row)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        return Tokens(self.headline, perplexity="pseudo_perplexity", accuracy="masked_accuracy")

    def get_heads(self, meta: Any, source: Any) -> tuple[list[str], list[str]]:
        """Returns the language head's modules if the checkpoint lacks it, else none."""
        from ftlevel.models.module_tree import get_new_language_head

        return get_new_language_head(meta)

    @property
    def head_message(self) -> str:
        return f"the checkpoint has no masked language head: new, {super().head_message}"

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        from ftlevel.data.encoding.collate import encode_masked
        from ftlevel.data.encoding.fit import FittedRows

        limit = encoder.limit(None)
        rows = encode_masked(encoder.tokenizer, examples, limit)
        if not rows:
            raise InputError(f"{table.source}: no text has a token to hide.")
        max_tokens = max(len(row.input_ids) for row in rows)
        split = sum(count > 1 for count in Counter(row.row for row in rows).values())
        reason = f"auto: {encoder.bounds.tightest[1]}" if split else "auto: the longest row"
        is_set = isinstance(encoder.config.max_length, int)
        length = limit if is_set and limit else max_tokens
        overlong = encoder.config.overlong
        return FittedRows(rows, length, "" if is_set else reason, split=split, overlong=overlong)

    def finish_data(
        self, prepared: PreparedData, config: DataConfig, context: EncodingContext
    ) -> PreparedData:
        masked = _mask_rows(prepared.train, config, context)
        data_info = {**prepared.info, "supervised": masked.count_hidden()}
        ratio = f"{data_info['supervised']:,} supervised, resampled each epoch"
        choices = [
            Choice(c.name, c.value, ratio) if c.name == "tokens" else c for c in prepared.choices
        ]
        eval_rows = self.evaluation_rows(prepared.validation, config, context)
        return replace(
            prepared, train=masked, validation=eval_rows, info=data_info, choices=choices
        )

    def evaluation_rows(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        return _mask_rows(rows, config, context).fixed()

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        """Returns the columns: filled text, predicted words and, if requested, rankings `top`."""
        check_options(replace(outputs, top_k=0), f"all words of --task {self.name}", "Use --top-k.")
        columns: dict[str, Column] = {"": "text", "words": "texts"}
        return columns | ({"top": "rankings"} if outputs.top_k else {})

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        """Create an example of the text `prompt`, which should contain a mask token."""
        return PlainText(prompt, number)

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        """Returns texts with masks filled; raises `UnansweredError` for texts without a mask."""
        tokenizer = model.tokenizer
        texts = [question.text.replace(_MASK, tokenizer.mask_token) for question in queries]
        missing = {
            i: f"has nothing to predict: no {_MASK} in {question.text[:40]!r}"
            for i, (text, question) in enumerate(zip(texts, queries, strict=True))
            if tokenizer.mask_token not in text
        }
        if missing:
            raise UnansweredError(missing)
        mask = tokenizer.mask_token_id
        rows = [
            Encoded(ids, [0 if token == mask else IGNORED for token in ids], i)
            for i, ids in enumerate(tokenizer(texts)["input_ids"])
        ]

        def read(row: Encoded, logits: Tensor) -> Prediction:
            # The embedding may be larger than the vocabulary.
            probabilities = logits[:, : len(tokenizer)].float().softmax(-1)
            text, words = texts[row.row], []
            for best in probabilities.argmax(-1).tolist():
                words.append(tokenizer.decode([best]).strip())
                text = text.replace(tokenizer.mask_token, words[-1], 1)
            top_tokens = _rank_tokens(tokenizer, probabilities[0], 5)
            columns: dict[str, Any] = {}
            if outputs.top_k:
                tops = [_rank_tokens(tokenizer, share, outputs.top_k) for share in probabilities]
                columns["top"] = [rank(top, outputs.top_k) for top in tops]
            return Prediction(text, top_tokens, columns={"": text, "words": words, **columns})

        return model.score(rows, read)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return list(ids)

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns the original token at each masked position."""
        labels = row.labels if isinstance(row.labels, list) else []
        spelled = decoder([max(label, 0) for label in labels])
        return [
            None if label == IGNORED else text for label, text in zip(labels, spelled, strict=True)
        ]


def _rank_tokens(tokenizer: Any, shares: Tensor, top_k: int) -> dict[str, float]:
    top = shares.topk(min(top_k, len(shares)))
    tokens = tokenizer.convert_ids_to_tokens(top.indices.tolist())
    return dict(zip(tokens, top.values.tolist(), strict=True))


def _mask_rows(rows: Sequence[Encoded], config: DataConfig, context: EncodingContext) -> MaskedRows:
    from ftlevel.data.encoding.collate import MaskedRows

    return MaskedRows(rows, context.tokenizer, ratio=config.mlm_probability, seed=context.seed)


TASKS = (
    MaskTask(
        name="masked-lm",
        shapes=(PLAIN_TEXT,),
        query_shapes=(PLAIN_TEXT,),
        auto_classes={"encoder": "AutoModelForMaskedLM"},
        peft_types={},
        headline="pseudo_perplexity",
        refusals={
            "decoder": "Use --task text-generation.",
            "encoder-decoder": "Use --task text-generation with a prompt and a completion.",
        },
    ),
)
