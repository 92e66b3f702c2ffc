"""Text tasks (generation, summarization, translation) and metrics of generated text.

Decoders continue a prompt or learn a plain text; encoder-decoders map a source to a target.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import encode_causal, encode_seq2seq
from ftlevel.data.encoding.prompts import (
    PromptFormat,
    choose_format,
    encode_chat_prompt,
    encode_prompt,
)
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.columns import (
    format_map_flags,
    get_language,
    get_language_mapping,
    map_preferred_columns,
    select_language_mapping,
)
from ftlevel.data.formats.detect import ExampleBuilder, Format, FormatSpec, fits
from ftlevel.data.formats.examples import (
    PLAIN_TEXT,
    Conversation,
    SourceTarget,
    create_conversation,
    create_pair,
    create_query_conversation,
    create_source,
)
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import ConfigError, InputError, UnansweredError
from ftlevel.objectives import Checks, Objective
from ftlevel.rouge import compute_rouge
from ftlevel.tasks.base import BaseTask, OutputOptions, Prediction, PromptedModel, TokenDecoder
from ftlevel.tasks.losses import Tokens

if TYPE_CHECKING:
    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


ROUGES = ("rouge1", "rouge2", "rougeL")
TRANSLATION_SCORES = ("chrf", "bleu")

# Written without spaces, so BLEU's default tokenizer would see one word per sentence.
_BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char"}


def score_rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str = "",  # noqa: ARG001 - the signature of all scores
) -> dict[str, float]:
    """Returns mean ROUGE-1, -2 and -L F1 between 0 and 1 (Lin, 2004), with Porter stemming."""
    scores = [_rouge(r, p) for r, p in zip(references, predictions, strict=True)]
    return {name: sum(s[name] for s in scores) / len(scores) for name in ROUGES}


@functools.lru_cache(maxsize=100_000)  # bootstrap resampling repeats pairs
def _rouge(reference: str, prediction: str) -> dict[str, float]:
    return compute_rouge(reference, prediction, ROUGES)


def score_translations(
    predictions: Sequence[str], references: Sequence[str], language: str = ""
) -> dict[str, float]:
    """Returns corpus chrF2 and BLEU, between 0 and 100.

    Uses sacrebleu's defaults (Post, 2018): chrF with 6-grams and beta 2 (Popović, 2015), BLEU-4
    with exponential smoothing. `language` selects BLEU's tokenizer: an ISO 639-1 code, or "".
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu = BLEU(tokenize=_BLEU_TOKENIZERS.get(language))
    hypotheses, expected = list(predictions), [list(references)]
    return {
        "chrf": CHRF().corpus_score(hypotheses, expected).score,
        "bleu": bleu.corpus_score(hypotheses, expected).score,
    }


_SYSTEM = {"system": ("system", "system_prompt")}
_ANSWERS = {"completion", "output", "messages", "conversations"}
CHAT = {**_SYSTEM, "tools": ("tools",)}  # optional columns of conversations
_MESSAGES = ("messages", "turns", "dialog", "conversation")
TURN_KEYS = ("role", "content", "user", "assistant")


def _dialogues(build: ExampleBuilder, *, has_target: bool) -> tuple[FormatSpec, ...]:
    prompt: dict[str, tuple[str, ...]] = {"prompt": ("prompt", "question", "query")}
    instruction: dict[str, tuple[str, ...]] = {"instruction": ("instruction",)}
    extra = {"input": ("input", "context")}
    pair, output = "prompt", "instruction"
    if has_target:
        pair, output = "prompt + completion", "instruction + output"
        prompt["completion"] = ("completion", "response", "answer")
        instruction["output"] = ("output", "response", "completion")
    return (
        FormatSpec("messages", build, {"messages": _MESSAGES}, CHAT, False, TURN_KEYS),
        FormatSpec(
            "conversations", build, {"conversations": ("conversations",)}, CHAT, False, TURN_KEYS
        ),
        FormatSpec(pair, build, prompt, _SYSTEM),
        FormatSpec(output, build, instruction, {**extra, **_SYSTEM}),
    )


_DOCUMENT = ("document", "article", "dialogue", "text")


@dataclass(frozen=True)
class TextTask(BaseTask):
    """Task whose target is a text, and base class of such tasks."""

    generates_text: ClassVar[bool] = True
    checks: ClassVar[Checks] = Checks(token_labels=True, ends=True)

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format of a table; raises `InputError` for preference data."""
        names = {column.lower(): column for column in column_names}
        is_mapped = config.columns or config.format
        if not is_mapped and {"chosen", "rejected"} <= names.keys():
            chosen = names["chosen"]
            flags = format_map_flags(
                map_preferred_columns(names, rows[0].get(chosen) if rows else None)
            )
            raise InputError(
                f"columns {chosen!r} and {names['rejected']!r} are for preference training, which "
                f"--task {self.name} does not support. Use --task preference, or train on the "
                f"chosen answers only: {flags}."
            )
        return super().get_format(column_names, config, rows)

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Returns the format; raises `InputError` if rows are labeled as bad answers."""
        column = next((name for name in format_.unused if name.lower() == "label"), None)
        if column is None or config.format or not format_.columns.keys() & _ANSWERS:
            return super().update_format(format_, table, config)
        verdicts = [str(row[column]).strip().lower() for row in table.rows]
        negatives = [i for i, verdict in enumerate(verdicts) if verdict in ("false", "0")]
        if negatives and set(verdicts) <= {"true", "false", "1", "0"}:
            raise InputError(
                f"{table.where(negatives[0])}: {column!r} is false in {len(negatives):,} of "
                f"{len(table):,} rows: bad answers, as for --task preference --loss kto, which "
                f"--task {self.name} would learn as good ones. Remove these rows, or pass --format "
                f"{format_.name.replace(' + ', '-')} if {column!r} says something else."
            )
        return super().update_format(format_, table, config)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        return Tokens(self.headline, kind == "encoder-decoder", kind == "decoder")

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        prompt = choose_format(tokenizer, kind, self.instruction, self.answer_cue)
        return {"prompt": prompt.to_dict()}

    def head_signature(self, labels: Sequence[str]) -> str:
        """Returns the same text for all text tasks, which use the same language head."""
        return "text"

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        return choose_format(tokenizer, kind, self.instruction, self.answer_cue)

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode plain texts, or prompts with answers; by default, only answers have labels."""
        if encoder.prompt_format is None:
            raise TypeError("a task that writes text has a prompt format")
        seq2seq = encoder.kind == "encoder-decoder"
        encode: Any = encode_seq2seq if seq2seq else encode_causal
        if encoder.config.train_on_inputs:
            if seq2seq:
                raise ConfigError(
                    "--train-on-inputs: an encoder-decoder writes its target alone, and reads the "
                    "source. Drop it."
                )
            encode = partial(encode_causal, with_inputs=True)
        encode_some = partial(encode, encoder.tokenizer, prompt_format=encoder.prompt_format)
        fitted = encoder.fit(encoder.collect(encode_some, examples), table)
        return encoder.fit_targets(fitted, table) if seq2seq else fitted

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        return SourceTarget(prompt, "", number)

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        prompts: list[list[int]] = []
        refused: dict[int, str] = {}
        for question in queries:
            try:
                prompt_format = model.prompt_format
                if prompt_format is None:
                    raise TypeError("a model that writes text has a prompt format")
                prompts.append(encode_query(model.tokenizer, prompt_format, question))
            except InputError as error:
                refused[question.row] = str(error).rstrip(".")
        if refused:
            raise UnansweredError(refused)
        return [Prediction(text, columns={"": text}) for text in model.write(prompts)]

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return list(ids)

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns each token's target, as `BaseTask` does; all None for an encoder-decoder."""
        if kind == "encoder-decoder":
            return [None] * len(row.input_ids)
        return super().decode_targets(row, names, kind, decoder)

    def get_decoder_labels(self, row: Encoded, kind: str) -> list[int]:
        if kind != "encoder-decoder" or not isinstance(row.labels, list):
            return []
        return [label for label in row.labels if label != IGNORED]


@dataclass(frozen=True)
class TranslationTask(TextTask):
    """Task of translation; the prompt's instruction names the languages if they are known."""

    def prepare_tokenizer(self, tokenizer: Any, kind: str) -> Choice | None:
        """Returns the languages of a multilingual tokenizer; `InputError` if they are not set."""
        if not hasattr(tokenizer, "tgt_lang"):
            return None
        source, target = tokenizer.src_lang, tokenizer.tgt_lang
        if target in (None, source):  # the tokenizer would mark targets as of the source language
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} marks languages by tokens; src_lang is "
                f"{source!r} and tgt_lang is {target!r}. Save a copy of the model and of "
                "AutoTokenizer.from_pretrained(MODEL, src_lang=…, tgt_lang=…), and use that."
            )
        return Choice("language tokens", f"{source} to {target}", "of the tokenizer")

    def column_mapping(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row]
    ) -> Mapping[str, str]:
        """Returns the columns of source and target if they are named by language, such as `de`."""
        if fits(column_names, self.shapes) or config.format is not None:
            return {}
        languages = get_language_mapping(column_names, rows)
        return select_language_mapping(
            languages, config.source_language, config.target_language, config.columns
        )

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Returns `format_` with the languages that columns or options name, and log lines."""
        format_, choices = super().update_format(format_, table, config)
        source = get_language("source", format_.columns, config.source_language)
        target = get_language("target", format_.columns, config.target_language)
        if not (source and target):
            flags = "--set data.source_language=… --set data.target_language=…"
            reason = f"the columns are not codes: {flags}"
            return format_, [*choices, Choice("languages", "not named in the prompt", reason)]
        options = {"languages": (source, target), "target_language": target.code}
        choice = Choice("languages", f"{source.name} to {target.name}")
        return replace(format_, options=options), [*choices, choice]

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        """Returns the prompt format; without an instruction if the rows have their own."""
        instruction, cue = self.instruction, self.answer_cue
        if "source" not in format_.columns or hasattr(tokenizer, "tgt_lang"):
            instruction = cue = ""  # the rows or the tokenizer have their own
        elif "languages" in format_.options:
            source, target = format_.options["languages"]
            instruction = name_languages(kind, source.name, target.name)
        return choose_format(tokenizer, kind, instruction, cue)

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        """Returns the ISO 639-1 code of the target language; "" if unknown."""
        return {"target_language": loaded.format.options.get("target_language", "")}


def encode_query(
    tokenizer: Any, prompt_format: PromptFormat, question: SourceTarget | Conversation
) -> list[int]:
    """Returns the token ids of the prompt; raises `InputError` if no chat template renders it."""
    if isinstance(question, SourceTarget):
        return encode_prompt(tokenizer, prompt_format, question.source)
    turns = [message.to_dict() for message in question.messages]
    if prompt_format.kind == "chat-template":
        return encode_chat_prompt(tokenizer, prompt_format.with_system(turns), question.tools)
    if [turn["role"] for turn in turns if turn["role"] != "system"] != ["user"]:
        raise InputError(
            f"a conversation of {len(turns)} messages, and the model has no chat template"
        )
    text = "\n\n".join(turn["content"] for turn in turns)
    return encode_prompt(tokenizer, prompt_format, text, has_system=turns[0]["role"] == "system")


def name_languages(kind: str, source: str, target: str) -> str:
    """Returns the instruction to translate; encoder-decoders get the wording of T5."""
    if kind == "encoder-decoder":
        return f"translate {source} to {target}:"
    return f"Translate from {source} to {target}."


_AUTO = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}
_PEFT = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
_NO_ENCODERS = {"encoder": "Use a decoder such as Llama, or T5 or BART."}

TASKS = (
    TextTask(
        name="text-generation",
        shapes=(*_dialogues(create_conversation, has_target=True), PLAIN_TEXT),
        query_shapes=(
            *_dialogues(create_query_conversation, has_target=False),
            FormatSpec("text", create_query_conversation, {"text": ("text", "content")}),
        ),
        auto_classes=_AUTO,
        peft_types=_PEFT,
        headline="perplexity",
        score_texts=score_rouge,
        text_metrics=ROUGES,
        builtin_subset="signatures",
        refusals={
            "encoder": "Use --task masked-lm or text-classification, or a model such as GPT-2 or "
            "Llama."
        },
    ),
    TextTask(
        name="summarization",
        shapes=(
            FormatSpec(
                "document + summary",
                create_pair,
                {"document": _DOCUMENT, "summary": ("summary", "highlights")},
            ),
            *_dialogues(create_pair, has_target=True),
        ),
        query_shapes=(
            FormatSpec("document", create_source, {"document": _DOCUMENT}),
            *_dialogues(create_source, has_target=False),
        ),
        auto_classes=_AUTO,
        peft_types=_PEFT,
        headline="rougeL",
        instruction="Summarize the following text.",
        answer_cue="Summary:",
        generates=True,
        score_texts=score_rouge,
        text_metrics=ROUGES,
        refusals=_NO_ENCODERS,
        builtin_subset="summarization",
    ),
    TranslationTask(
        name="translation",
        shapes=(
            FormatSpec(
                "source + target", create_pair, {"source": ("source",), "target": ("target",)}
            ),
            *_dialogues(create_pair, has_target=True),
        ),
        query_shapes=(
            FormatSpec("source", create_source, {"source": ("source",)}),
            *_dialogues(create_source, has_target=False),
        ),
        auto_classes=_AUTO,
        peft_types=_PEFT,
        headline="chrf",
        instruction="Translate the following text.",
        answer_cue="Translation:",
        generates=True,
        score_texts=score_translations,
        text_metrics=TRANSLATION_SCORES,
        refusals=_NO_ENCODERS,
    ),
)

TEXT_FIELDS = {field.name: getattr(TASKS[0], field.name) for field in fields(TextTask)}
"""Field → value of text generation, for tasks that share most of them."""
