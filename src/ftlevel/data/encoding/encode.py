"""Encode examples as token ids and labels.

The final EOS is always a label, as labels are masked by position and never by id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ftlevel.data.encoding.chat import RenderedChat, list_usable_templates, render_chat
from ftlevel.data.encoding.prompts import PromptFormat, strip_bos_eos
from ftlevel.data.encoding.row import IGNORED, Encoded, RowError
from ftlevel.data.formats.examples import Conversation, LabeledText, PlainText, SourceTarget
from ftlevel.data.formats.turns import Message
from ftlevel.errors import InputError

_BATCH = 1_000


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
        advice = "Use rows of one question and one answer"
        pairs = [_as_pair(example, advice) for example in chunk]
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
    advice = f"Add --chat-template {list_usable_templates(tokenizer)[0]}"
    pairs = [_as_pair(example, advice) for example in examples]
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


def _as_pair(example: Any, advice: str) -> SourceTarget:
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
            f"{advice}, or use a model with a template (an -Instruct model).",
        )
    raise InputError(
        "an encoder–decoder needs a source and a target, and these rows are plain text. Use data "
        "with a prompt and a completion column."
    )
