"""Prompts without a chat template: tokens of prompts and answers in every model family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ftlevel.artifacts.cards import CARD, AdapterCard, load_card
from ftlevel.data.encoding.encode import encode_causal, encode_seq2seq
from ftlevel.data.encoding.prompts import (
    PromptFormat,
    choose_format,
    encode_prompt,
    load_prompt_format,
)
from ftlevel.data.encoding.row import IGNORED
from ftlevel.data.formats.examples import PlainText, SourceTarget
from ftlevel.errors import InputError
from tiny_tokenizers import _unigram_parts, build_tokenizer

PROMPT_TEXTS = {"instruction": "Summarize the following text.", "answer_cue": "Summary:"}
SOURCES = ["the name", "the name: ", "What is it?", "Return it:\n", "a\n\n", "tab\t"]
ANSWERS = ["configuration of files", " the value", "42 files", "\nnew line", "(é) ünïcode"]
_CARD: dict[str, Any] = {
    "format": 1, "method": "lora", "task": "text-generation", "base": {}, "quantization": {},
    "dtype": "float32", "max_length": 9, "data": {"name": "x", "columns": {}},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=["gpt2", "gpt_neox", "opt", "llama", "phi3", "qwen2", "gemma3_text", "bert", "t5"],
)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    result = build_tokenizer(request.param, chat=False)
    if request.param == "bert":  # a WordPiece tokenizer with an EOS token
        result.eos_token = result.sep_token
    return result


def encode(
    tokenizer: Any, prompt_format: PromptFormat, source: str, answer: str
) -> tuple[list[int], ...]:
    """Return the token ids of a row's prompt and answer."""
    (row,) = encode_causal(tokenizer, [SourceTarget(source, answer, 0)], prompt_format)
    start = next(i for i, label in enumerate(row.labels) if label != IGNORED)  # type: ignore[arg-type]
    assert row.labels == [IGNORED] * start + row.input_ids[start:]
    assert row.input_ids[-1] == tokenizer.eos_token_id
    return row.input_ids[:start], row.input_ids[start:-1]


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` without a trailing EOS token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("separator", ["cue", "\n", ""])
def test_row_tokens_equal_tokens_of_joined_text(tokenizer, separator):
    prompt_format = choose_format(
        tokenizer, "decoder", *(PROMPT_TEXTS.values() if separator == "cue" else ("", ""))
    )
    if separator == "\n":
        prompt_format = prompt_format.resolve_separator([SourceTarget("a", "b", 0)])
    for source in SOURCES:
        for answer in ANSWERS:
            prompt, target = encode(tokenizer, prompt_format, source, answer)
            assert prompt == encode_prompt(tokenizer, prompt_format, source)
            text = (
                f"{prompt_format.user_text(source)}\n\nSummary: " if separator == "cue" else source
            )
            text += "" if text[-1:].isspace() else separator
            assert prompt == tokenize(tokenizer, text.removesuffix(" "))
            joined = text.removesuffix(" ") if answer[:1].isspace() else text
            assert prompt + target == tokenize(tokenizer, joined + answer)


def test_prompt_does_not_end_in_space_token(tokenizer):
    cue = choose_format(tokenizer, "decoder", *PROMPT_TEXTS.values())
    for prompt_format, source in ((cue, "the name"), (PromptFormat("plain"), "the name: ")):
        ids = encode_prompt(tokenizer, prompt_format, source)
        assert tokenizer.decode(ids[-1:]).strip() == ":"
        _, answer = encode(tokenizer, prompt_format, source, "name")
        assert answer == tokenize(tokenizer, "x name")[len(tokenize(tokenizer, "x")) :]


def test_answer_that_continues_last_word_of_prompt():
    """The prompt is tokenized as in generation, even if the answer continues its last word."""
    prompt_format = PromptFormat("plain")
    for family in ("qwen2", "llama"):
        tokenizer = build_tokenizer(family, chat=False)
        prompt, answer = encode(tokenizer, prompt_format, "the na", "me")
        assert (
            prompt
            == encode_prompt(tokenizer, prompt_format, "the na")
            == tokenize(tokenizer, "the na")
        )
        assert prompt + answer != tokenize(tokenizer, "the name")
        assert tokenizer.decode(prompt + answer, skip_special_tokens=True) == "the name"


def test_separator_is_resolved_from_rows():
    plain_format = PromptFormat("plain")
    assert plain_format.resolve_separator([PlainText("a b", 0)]).separator == ""
    assert (
        plain_format.resolve_separator(
            [SourceTarget("a", " b", 0), SourceTarget("c\n", "d", 1)]
        ).separator
        == ""
    )
    assert (
        plain_format.resolve_separator(
            [SourceTarget("a", " b", 0), SourceTarget("c", "d", 1)]
        ).separator
        == "\n"
    )
    chat = PromptFormat("chat-template")
    assert chat.resolve_separator([SourceTarget("a", "b", 0)]) is chat


def write_card(folder: Path, prompt: Any) -> AdapterCard:
    (folder / CARD).write_text(json.dumps({**_CARD, "prompt": prompt}))
    return load_card(folder)


@pytest.mark.parametrize("kind", ["plain", "chat-template", "seq2seq"])
def test_prompt_format_roundtrip(kind, tmp_path):
    prompt_format = PromptFormat(kind, "Do it.", separator="\n" if kind == "plain" else "")
    assert ("version" in prompt_format.to_dict()) == (kind == "plain")
    assert load_prompt_format(write_card(tmp_path, prompt_format.to_dict())) == prompt_format


def test_prompt_format_of_another_version_raises(tmp_path):
    for changes in ({}, {"version": 3}, {"version": 2, "suffix": "x"}):
        card = write_card(tmp_path, {"kind": "plain", "instruction": "", **changes})
        with pytest.raises(InputError, match=r"another version of ftlevel. Install that version"):
            load_prompt_format(card)
    with pytest.raises(InputError, match="is not the card of an adapter"):
        write_card(tmp_path, ["plain"])


def test_empty_prompt_raises():
    tokenizer = build_tokenizer("gpt2", chat=False)
    for text in ("", " "):
        with pytest.raises(InputError, match="the prompt is empty"):
            encode_prompt(tokenizer, PromptFormat("plain"), text)


def test_target_ends_as_the_tokenizer_ends_it():
    """In mBART, the language's token follows EOS, and the decoder starts with it."""
    parts = _unigram_parts(["<s>", "<pad>", "</s>", "<unk>"])
    mbart = transformers.MBartTokenizer(vocab=parts, src_lang="en_XX", tgt_lang="de_DE")
    for tokenizer in (mbart, build_tokenizer("t5")):
        rows = encode_seq2seq(
            tokenizer, [SourceTarget("a", "the file", 0)], PromptFormat("seq2seq")
        )
        assert rows[0].labels == tokenizer(text_target="the file")["input_ids"]
