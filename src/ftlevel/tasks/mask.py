"""Masked language modelling: fill in tokens that were hidden; adapts an encoder to its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.examples import PLAIN_TEXT
from ftlevel.data.sources.table import Table
from ftlevel.errors import ConfigError, InputError
from ftlevel.task import Checks, Objective
from ftlevel.tasks.base import BaseTask, PromptedModel, Reply, Speller
from ftlevel.tasks.tokens import Tokens

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import Fitted
    from ftlevel.data.encoding.masking import MaskedRows
    from ftlevel.data.prepare.context import EncodingContext, Prepared
    from ftlevel.data.prepare.encoder import Encoder

_MASK = "[MASK]"


@dataclass(frozen=True)
class MaskTask(BaseTask):
    """A task whose targets are tokens that were hidden."""

    needs_offsets: ClassVar[bool] = True
    checks: ClassVar[Checks] = Checks(supervised=False)  # labels are drawn later, one at least

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Return the cross entropy of the hidden tokens."""
        return Tokens(self.headline, perplexity="pseudo_perplexity", accuracy="masked_accuracy")

    def find_heads(self, meta: Any, source: Any) -> tuple[list[str], list[str]]:
        """Return the language head where the checkpoint has none."""
        from ftlevel.models.targets import find_new_language_head

        return find_new_language_head(meta)

    @property
    def why_heads(self) -> str:
        """Why the language head is trained in full."""
        return f"the checkpoint has no masked language head: new, {super().why_heads}"

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
        """Return the texts in blocks, none of whose tokens is hidden yet."""
        from ftlevel.data.encoding.fit import Fitted
        from ftlevel.data.encoding.masking import encode_masked

        limit = encoder.limit(None)
        rows = encode_masked(encoder.tokenizer, examples, limit)
        if not rows:
            raise InputError(f"{table.source}: no text has a token to hide.")
        longest = max(len(row.input_ids) for row in rows)
        pieces: dict[int, int] = {}
        for row in rows:
            pieces[row.row] = pieces.get(row.row, 0) + 1
        split = sum(count > 1 for count in pieces.values())
        reason = f"auto: {encoder.bounds.tightest[1]}" if split else "auto: the longest row"
        given = isinstance(encoder.config.max_length, int)
        length = limit if given and limit else longest
        overlong = encoder.config.overlong
        return Fitted(rows, length, "" if given else reason, split=split, overlong=overlong)

    def finish(self, prepared: Prepared, config: DataConfig, context: EncodingContext) -> Prepared:
        """Return rows whose tokens are hidden as they are taken, drawn anew each epoch."""
        train = _hide(prepared.train, config, context)
        facts = {**prepared.facts, "supervised": train.count_hidden()}
        share = f"{facts['supervised']:,} supervised, drawn anew each epoch"
        choices = [
            Choice(c.name, c.value, share) if c.name == "tokens" else c for c in prepared.choices
        ]
        validation = self.fix(prepared.validation, config, context)
        return replace(prepared, train=train, validation=validation, facts=facts, choices=choices)

    def fix(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        """Return rows with the same tokens hidden whenever they are taken."""
        return _hide(rows, config, context).fixed()

    def answer(
        self, model: PromptedModel, prompts: Sequence[str], context: str | None
    ) -> list[Reply]:
        """Return each text with its masks filled in, and what else the first could be.

        Raises:
            ConfigError: a text without a mask.
        """
        tokenizer = model.tokenizer
        texts = [text.replace(_MASK, tokenizer.mask_token) for text in prompts]
        for text in texts:
            if tokenizer.mask_token not in text:
                raise ConfigError(
                    f"--prompt {text!r} has nothing to fill in. Write {_MASK} somewhere."
                )
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        rows = [Encoded(ids, [IGNORED] * len(ids), i) for i, ids in enumerate(encoded)]
        replies = []
        for text, row, logits in zip(texts, rows, model.score(rows), strict=True):
            places = [
                i for i, token in enumerate(row.input_ids) if token == tokenizer.mask_token_id
            ]
            # An embedding may have more rows than the vocabulary has words.
            shares = logits[places, : len(tokenizer)].float().softmax(-1)
            for best in shares.argmax(-1).tolist():
                text = text.replace(tokenizer.mask_token, tokenizer.decode([best]).strip(), 1)
            top = shares[0].topk(5)
            words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
            replies.append(Reply(text, dict(zip(words, top.values.tolist(), strict=True))))
        return replies

    def probe_labels(self, ids: Sequence[int], labels: Sequence[str], options: Any) -> Any:
        """Return the tokens themselves."""
        return list(ids)

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, speller: Speller
    ) -> list[str | None]:
        """Return what was hidden at each token."""
        labels = row.labels if isinstance(row.labels, list) else []
        spelled = speller.spell([max(label, 0) for label in labels])
        return [
            None if label == IGNORED else text for label, text in zip(labels, spelled, strict=True)
        ]


def _hide(rows: Sequence[Encoded], config: DataConfig, context: EncodingContext) -> MaskedRows:
    from ftlevel.data.encoding.masking import MaskedRows

    return MaskedRows(rows, context.tokenizer, share=config.mlm_probability, seed=context.seed)


TASKS = (
    MaskTask(
        name="masked-lm",
        shapes=(PLAIN_TEXT,),
        auto_classes={"encoder": "AutoModelForMaskedLM"},
        peft_types={},
        headline="pseudo_perplexity",
        refusals={
            "decoder": "Use --task text-generation.",
            "encoder-decoder": "Use --task text-generation with a prompt and a completion.",
        },
    ),
)
