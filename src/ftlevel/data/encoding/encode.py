"""Encode examples as token ids and labels; the label -100 excludes a token from the loss.

Training, evaluation and generation share one `PromptFormat`, which is saved with the adapter. The
final EOS is always a label, as labels are masked by position and never by id.

Tokenizers merge a space with the following word (`▁word`, `Ġword`), so the space between prompt and
answer belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.data.encoding.chat import RenderedChat, Turn, render, render_chat
from ftlevel.data.formats.examples import Conversation, LabeledText, PlainText, SourceTarget
from ftlevel.data.formats.turns import Message
from ftlevel.errors import InputError
from ftlevel.objectives import IGNORED as IGNORED
from ftlevel.objectives import StepTexts

PROMPT_VERSION = 2
"""Version of plain prompts: the answer begins with the space after the cue, and both are tokenized
as one text."""

_OF_PLAIN = ("separator", "version")
"""Fields that apply to plain prompts only."""


@dataclass(frozen=True)
class PromptFormat:
    """Format of the prompts of a run, which is saved with the adapter.

    Attributes:
        kind: "chat-template", "plain", or "seq2seq" for an encoder-decoder.
        answer_cue: end of a plain prompt, such as `Summary:`.
        system: system prompt for conversations without one.
        separator: text between prompt and answer in plain text, if there is no cue.
    """

    kind: Literal["chat-template", "plain", "seq2seq"]
    instruction: str = ""
    answer_cue: str = ""
    system: str = ""
    separator: str = ""
    version: int = PROMPT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that apply to `kind`, for `ftlevel.json`."""
        unused = () if self.kind == "plain" else _OF_PLAIN
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in unused and (value or name != "system")
        }

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns `turns`, preceded by the system prompt if they have none."""
        if not self.system or (turns and turns[0]["role"] == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def user_text(self, text: str) -> str:
        """Returns the instruction, an empty line, and `text`."""
        return f"{self.instruction}\n\n{text}" if self.instruction else text

    def plain_prompt(self, text: str, *, has_system: bool = False) -> str:
        """Returns `text` as a plain prompt, preceded by the system prompt unless `has_system`."""
        return self.plain_parts(text, "", has_system=has_system)[0]

    def plain_parts(self, source: str, target: str, *, has_system: bool) -> tuple[str, str]:
        """Returns prompt and answer, whose concatenation is the text of the row.

        A trailing space moves from prompt to answer, unless `target` begins with white space.
        """
        text = self.user_text(source)
        if self.system and not has_system:
            text = f"{self.system}\n\n{text}"
        if self.answer_cue:
            text = f"{text}\n\n{self.answer_cue} "
        elif not text[-1:].isspace():
            text += self.separator
        if not text.endswith(" "):
            return text, target
        return text[:-1], target if target[:1].isspace() else f" {target}"

    def resolve_separator(self, examples: Sequence[Any]) -> PromptFormat:
        """Returns the format with the separator that fits `examples` (all of one type).

        The separator is empty if all prompts end or all answers begin with white space, as in TRL,
        else a newline.
        """
        if self.kind != "plain":
            return self
        joined = bool(self.answer_cue) or all(map(_joins, examples))
        return replace(self, separator="" if joined else "\n")


def _joins(example: Any) -> bool:
    if isinstance(example, PlainText):
        return True
    content = example.content
    return bool(content.input_text[-1:].isspace() or content.target_text[:1].isspace())


def choose_format(tokenizer: Any, kind: str, instruction: str, answer_cue: str) -> PromptFormat:
    """Returns seq2seq for an encoder-decoder, else chat-template if there is one, else plain."""
    if kind == "encoder-decoder":
        return PromptFormat("seq2seq", instruction)
    if getattr(tokenizer, "chat_template", None):
        return PromptFormat("chat-template", instruction)
    return PromptFormat("plain", instruction, answer_cue)


def load_prompt_format(card: AdapterCard) -> PromptFormat | None:
    """Returns the prompt format in a model's `card`, or None; `InputError` if it is unknown."""
    if not card.prompt:
        return None
    names = {field.name for field in fields(PromptFormat)}
    version = PROMPT_VERSION if card.prompt.get("kind") == "plain" else None
    if not card.prompt.keys() <= names or card.prompt.get("version") != version:
        raise InputError(
            f"its ftlevel.json has prompts as {dict(card.prompt)}, written by another version of "
            "ftlevel. Install that version."
        )
    return PromptFormat(**card.prompt)


def encode_prompt(
    tokenizer: Any, prompt_format: PromptFormat, source: str, *, has_system: bool = False
) -> list[int]:
    """Returns the token ids of a prompt as in training; raises `InputError` if it is empty."""
    if prompt_format.kind == "seq2seq":
        return list(tokenizer(prompt_format.user_text(source))["input_ids"])
    if prompt_format.kind == "chat-template":
        turns = [{"role": "user", "content": prompt_format.user_text(source)}]
        return encode_chat_prompt(tokenizer, prompt_format.with_system(turns))
    text = prompt_format.plain_prompt(source, has_system=has_system)
    ids = strip_bos_eos(tokenizer(text)["input_ids"], tokenizer)
    if not ids:
        raise InputError("the prompt is empty, and the tokenizer has no token to begin with")
    return ids


def encode_chat_prompt(
    tokenizer: Any, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Returns the token ids of `turns` and the generation prompt, without a space at the end."""
    text = render(tokenizer, turns, tools, generation_prompt=True).removesuffix(" ")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def strip_bos_eos(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Returns `ids` without a duplicate BOS and without a final EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = 1 if bos is not None and list(ids[:2]) == [bos, bos] else 0
    end = len(ids) - (eos is not None and list(ids[-1:]) == [eos])
    return list(ids[start:end])


_BATCH = 1_000
ROW_TYPES: dict[str, type[Encoded]] = {}
"""Row classes by name, to restore stored rows."""


class RowError(InputError):
    """Error: the example at index `row` cannot be encoded; `message` has the reason and a fix."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(f"row {row + 1} {message}")
        self.row, self.message = row, message

    def __reduce__(self) -> tuple[type[RowError], tuple[int, str]]:
        return RowError, (self.row, self.message)


@dataclass(frozen=True)
class Encoded:
    """One encoded row; a task may define a subclass.

    Attributes:
        input_ids: token ids of the row, or of the source for an encoder-decoder.
        labels: a list (one label per input token, or an encoder-decoder's target ids), a class or
            value, or a tuple (0.0 or 1.0 per class, or first and last token of a span).
        row: index of the example in its table.
        extras: additional model inputs by name, such as `token_type_ids`.
        has_several_texts: whether a row has several texts, such as a query and documents.
    """

    has_several_texts: ClassVar[bool] = False
    input_ids: list[int]
    labels: list[int] | int | float | tuple[float, ...] | tuple[int, int]
    row: int
    extras: dict[str, list[int]] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        ROW_TYPES[cls.__name__] = cls

    @property
    def supervised(self) -> int:
        """Number of tokens or labels that contribute to the loss."""
        if isinstance(self.labels, int | float):
            return 1
        return sum(label != IGNORED for label in self.labels)

    @property
    def sequences(self) -> Sequence[Encoded]:
        """Sequences that the model processes: the row itself, or one per answer or text of it."""
        return (self,)

    @property
    def preference_labels(self) -> Sequence[tuple[float, float, float]]:
        """Labels of preference training, one per sequence; empty for other tasks.

        A label is (1.0 if preferred or desirable else 0.0, reference log-probability, margin).
        """
        return ()

    @property
    def teacher(self) -> Any:
        """Teacher outputs for each target as a structured array, or None.

        `known` has the log-probabilities `(targets, k + 1)` of the top tokens `ids` `(targets, k)`,
        then of all other tokens together; with k = 0, those of the whole vocabulary.
        """
        return None

    @property
    def signals(self) -> Any:
        """Inputs of a policy loss (advantage, weight, …), `(targets, n)`; or None."""
        return None

    @property
    def contrasts(self) -> Sequence[Encoded]:
        """Sequences evaluated without gradient, such as the mismatched pairs of KTO."""
        return ()

    @property
    def cluster(self) -> bytes | None:
        """Key of the group that bootstrap intervals resample together, such as a query; or None."""
        return None

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return len(self.input_ids)

    def truncated(self, limit: int) -> Encoded | None:  # noqa: ARG002 - of subclasses
        """Returns the row cut to `limit` tokens; None (the default) leaves it to `truncate_row`."""
        return None

    def without(self, num_tokens: int) -> Encoded:
        """Returns the row without the `num_tokens` prompt tokens after the first token."""
        ids, labels = self.input_ids, self.labels
        if not isinstance(labels, list):
            raise TypeError("a row without a label for each token has no prompt")
        return replace(
            self,
            input_ids=ids[:1] + ids[1 + num_tokens :],
            labels=labels[:1] + labels[1 + num_tokens :],
        )


ROW_TYPES[Encoded.__name__] = Encoded


def encode_causal(
    tokenizer: Any,
    examples: Sequence[Any],
    prompt_format: PromptFormat,
    *,
    with_inputs: bool = False,
) -> list[Encoded]:
    """Encode plain texts, prompt-answer pairs or conversations (all of one type) for a decoder.

    `with_inputs` adds the prompts to the labels. Raises `InputError` without an EOS token, for
    several turns without a chat template, and for a system prompt with plain texts.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no EOS token, so the model cannot "
            "learn where to stop. Set eos_token in its tokenizer_config.json."
        )
    rows: list[Encoded] = []
    for chunk in split_batches(examples):
        if isinstance(chunk[0], PlainText):
            if prompt_format.system:
                raise InputError(
                    "--system needs conversations, and these rows are plain text. Drop it, or "
                    "use data with a prompt and a completion column."
                )
            rows += _encode_texts(tokenizer, chunk)
        elif prompt_format.kind == "chat-template":
            rows += _encode_chats(tokenizer, chunk, prompt_format)
        else:
            rows += _encode_completions(tokenizer, chunk, prompt_format)
    return [_with_inputs(row) for row in rows] if with_inputs else rows


def _with_inputs(row: Encoded) -> Encoded:
    """Returns the row with labels on the prompts too, but none after the last answer."""
    labels: Any = row.labels
    last = max((i for i, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    return replace(row, labels=row.input_ids[:last] + labels[last:])


def encode_seq2seq(
    tokenizer: Any, examples: Sequence[Any], prompt_format: PromptFormat
) -> list[Encoded]:
    """Encode source-target pairs and single-turn conversations for an encoder-decoder."""
    rows: list[Encoded] = []
    for chunk in split_batches(examples):
        pairs = [_as_pair(example) for example in chunk]
        sources = tokenizer([prompt_format.user_text(p.source) for p in pairs])["input_ids"]
        targets = tokenizer(text_target=[p.target for p in pairs])["input_ids"]
        rows += [
            Encoded(s, _ended(t, tokenizer), p.row)
            for s, t, p in zip(sources, targets, pairs, strict=True)
        ]
    return rows


def encode_labeled(
    tokenizer: Any,
    examples: Sequence[LabeledText],
    target_of: Callable[[LabeledText], int | float | tuple[float, ...]],
) -> list[Encoded]:
    """Encode texts or text pairs; the label of each is `target_of(example)`."""
    rows: list[Encoded] = []
    for chunk in split_batches(examples):
        pairs = [e.text_pair for e in chunk]
        encoding = tokenizer([e.text for e in chunk], pairs if pairs[0] is not None else None)
        rows += [
            Encoded(encoding["input_ids"][i], target_of(e), e.row, extra_inputs(encoding, i))
            for i, e in enumerate(chunk)
        ]
    return rows


def split_batches(examples: Sequence[Any], size: int | None = None) -> Iterator[Sequence[Any]]:
    """Yields `examples` in batches for the tokenizer."""
    size = size or _BATCH
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def extra_inputs(encoding: Any, index: int) -> dict[str, list[int]]:
    """Returns model inputs besides tokens, e.g. `token_type_ids`, of row `index` of `encoding`."""
    return {name: encoding[name][index] for name in encoding if name not in _NO_EXTRAS}


_NO_EXTRAS = ("input_ids", "attention_mask", "offset_mapping", "overflow_to_sample_mapping")


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id  # in mBART, the language's token follows it
    return ids if eos is None or eos in ids[-2:] else [*ids, eos]


def _encode_texts(tokenizer: Any, examples: Sequence[PlainText]) -> list[Encoded]:
    encoded = tokenizer([e.text for e in examples])["input_ids"]
    rows = []
    for ids, example in zip(encoded, examples, strict=True):
        ended = [*strip_bos_eos(ids, tokenizer), tokenizer.eos_token_id]
        rows.append(Encoded(ended, list(ended), example.row))
    return rows


def _encode_chats(
    tokenizer: Any, examples: Sequence[Any], prompt_format: PromptFormat
) -> list[Encoded]:
    rendered = [_render_example(tokenizer, example, prompt_format) for example in examples]
    # The template adds BOS itself.
    encoding = tokenizer(
        [r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True
    )
    rows = []
    fields = (encoding["input_ids"], encoding["offset_mapping"])
    for chat, example, ids, offsets in zip(rendered, examples, *fields, strict=True):
        labels = [
            token if start < end and chat.is_target(start, end) else IGNORED
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        rows.append(Encoded(ids, labels, example.row))
    return rows


def _render_example(tokenizer: Any, example: Any, prompt_format: PromptFormat) -> RenderedChat:
    tools = example.tools if isinstance(example, Conversation) else ()
    if isinstance(example, SourceTarget):
        messages: Sequence[Message] = (
            Message("user", prompt_format.user_text(example.source)),
            Message("assistant", example.target),
        )
    else:
        messages = example.messages
    turns = prompt_format.with_system([message.to_dict() for message in messages])
    try:
        return render_chat(tokenizer, turns, tools)
    except InputError as error:
        raise RowError(example.row, str(error)) from error


def _encode_completions(
    tokenizer: Any, examples: Sequence[Any], prompt_format: PromptFormat
) -> list[Encoded]:
    """Encode prompts as in generation; the answer has the tokens that follow in the full text."""
    pairs = [_as_pair(example) for example in examples]
    texts = []
    for pair, example in zip(pairs, examples, strict=True):
        has_system = isinstance(example, Conversation) and example.messages[0].role == "system"
        texts.append(prompt_format.plain_parts(pair.source, pair.target, has_system=has_system))
    encoded = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    prompts = [strip_bos_eos(ids, tokenizer) for ids in encoded]
    encoded = tokenizer(["".join(text) for text in texts])["input_ids"]
    rows = []
    for ids, prompt, (_, written), pair in zip(encoded, prompts, texts, pairs, strict=True):
        ids = strip_bos_eos(ids, tokenizer)
        is_prefix = ids[: len(prompt)] == prompt
        answer = ids[len(prompt) :] if is_prefix else _encode_inside(tokenizer, written)
        target = _ended(answer, tokenizer)
        rows.append(Encoded(prompt + target, [IGNORED] * len(prompt) + target, pair.row))
    return rows


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    head = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    if ids[: len(head)] == head:
        return ids[len(head) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_pair(example: Any) -> SourceTarget:
    if isinstance(example, SourceTarget):
        return example
    if isinstance(example, Conversation):
        *before, last = example.messages
        roles = [message.role for message in example.messages]
        if roles in (["user", "assistant"], ["system", "user", "assistant"]):
            return SourceTarget("\n\n".join(m.content for m in before), last.content, example.row)
        raise RowError(
            example.row,
            f"is a conversation of {len(roles)} messages, and the model has no chat template. "
            f"Add --chat-template chatml, or use a model with a template (an -Instruct model).",
        )
    raise InputError(
        "an encoder–decoder needs a source and a target, and these rows are plain text. Use data "
        "with a prompt and a completion column."
    )


@dataclass(frozen=True)
class EncodedText(Encoded):
    """One text to embed; its first `unpooled` tokens are not pooled; `ends`: with EOS or SEP."""

    unpooled: int = field(default=0, metadata={"column": "int"})
    ends: int = field(default=1, metadata={"column": "int"})

    @property
    def key(self) -> tuple[int, ...]:
        """Key of the text, from its tokens and `unpooled`; equal keys have equal embeddings."""
        return (self.unpooled, *self.input_ids)

    def truncated(self, limit: int) -> EncodedText:
        """Returns the text with at most `limit` tokens; EOS or SEP at its end is kept."""
        ids = self.input_ids
        if len(ids) <= limit:
            return self
        unpooled = min(self.unpooled, limit - 1)
        ids = [*ids[: limit - 1], ids[-1 if self.ends else limit - 1]]
        return replace(self, input_ids=ids, unpooled=unpooled)


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """Row of an embedding model: a query with documents, a scored pair, or a text with a class.

    Attributes:
        input_ids: tokens of all texts, one after the other.
        labels: label or score of each document, or the class index.
        sizes: number of tokens of each text.
        teacher_scores: a teacher's score of each document; empty without a teacher.
        prompts: number of tokens of the prompt of each text.
        words: the texts as strings, for a guide or teacher model; empty if there is none.
        unpooled: number of leading tokens of each text left out of pooling; empty if none are.
        ends: whether the texts end with EOS or SEP.
    """

    has_several_texts = True
    sizes: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    teacher_scores: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    prompts: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    words: tuple[str, ...] = field(default=(), metadata={"column": "json"})
    unpooled: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    ends: int = field(default=1, metadata={"column": "int"})

    @property
    def guide(self) -> Any:
        """Embedding of each text by a guide model, or None."""
        return None

    def with_teacher(self, scores: tuple[float, ...]) -> EncodedTexts:
        """Returns the row with a teacher's `scores` of its documents."""
        return replace(self, teacher_scores=scores)

    @property
    def sequences(self) -> Sequence[EncodedText]:
        """One sequence per text, with a dummy label."""
        spans = pairwise(accumulate(self.sizes, initial=0))
        return [
            EncodedText(self.input_ids[a:b], 0, self.row, {}, min(skipped, b - a - 1), self.ends)
            for (a, b), skipped in zip(spans, self.unpooled or (0,) * len(self.sizes), strict=True)
        ]

    @property
    def length(self) -> int:
        """Number of tokens of the longest text."""
        return max(self.sizes)

    def truncated(self, limit: int) -> Encoded:
        """Returns the row, each text cut to `limit` tokens; EOS or SEP at its end is kept."""
        ids = [token for text in self.sequences for token in text.truncated(limit).input_ids]
        return replace(self, input_ids=ids, sizes=tuple(min(size, limit) for size in self.sizes))


def distinct_texts(rows: Sequence[Any]) -> tuple[list[EncodedText], StepTexts]:
    """Returns the distinct texts of `rows`, and a `StepTexts` with each row's indices into them.

    Rows with a negative index `row`, which only fill up a batch, are left out.
    """
    texts: list[EncodedText] = []
    index_of: dict[tuple[int, ...], int] = {}
    indices: list[tuple[int, ...]] = []
    guide: list[Any] = []
    real = [row for row in rows if row.row >= 0]
    for row in real:
        sequences = row.sequences
        keys = [sequence.key for sequence in sequences]
        for at, (key, sequence) in enumerate(zip(keys, sequences, strict=True)):
            if key not in index_of:
                index_of[key] = len(texts)
                texts.append(sequence)
                if (vectors := row.guide) is not None:
                    guide.append(vectors[at])
        indices.append(tuple(map(index_of.__getitem__, keys)))
    labels = tuple(tuple(row.labels) for row in real)
    scores = tuple(row.teacher_scores for row in real)
    texts = texts or list(rows[0].sequences[:1])
    text_keys = tuple(text.key for text in texts)
    return texts, StepTexts(tuple(indices), labels, scores, guide or None, text_keys)


def add_texts(texts: list[EncodedText], more: Sequence[EncodedText]) -> list[int]:
    """Add the texts of `more` that `texts` (modified) lacks; returns their indices in `texts`."""
    index_of = {text.key: at for at, text in enumerate(texts)}
    indices = []
    for text in more:
        index = index_of.setdefault(text.key, len(texts))
        if index == len(texts):
            texts.append(text)
        indices.append(index)
    return indices
