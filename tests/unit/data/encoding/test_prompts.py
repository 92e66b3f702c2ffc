"""Prompts without a chat template: their tokens and those of the answers, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlevel.artifacts.cards import CARD, AdapterCard, load_card
from ftlevel.artifacts.run_directory import CONFIG, SUMMARY
from ftlevel.data.encoding.encode import (
    IGNORED,
    PromptFormat,
    choose_format,
    encode_causal,
    encode_prompt,
    load_prompt_format,
)
from ftlevel.data.formats.examples import PlainText, SourceTarget
from ftlevel.errors import InputError
from tiny_tokenizers import build_tokenizer

CUE = {"instruction": "Summarize the following text.", "answer_cue": "Summary:"}
SOURCES = ["the name", "the name: ", "What is it?", "Return it:\n", "a\n\n", "tab\t"]
ANSWERS = ["configuration of files", " the value", "42 files", "\nnew line", "(é) ünïcode"]
OLD_CARD: dict[str, Any] = {
    "format": 1, "method": "lora", "task": "text-generation", "base": {}, "quantization": {},
    "dtype": "float32", "max_length": 9, "data": {"name": "x", "columns": {}},
    "prompt": {"kind": "plain", "instruction": "", "answer_cue": ""},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=["gpt2", "gpt_neox", "opt", "llama", "phi3", "qwen2", "gemma3_text", "bert", "t5"],
)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    built = build_tokenizer(request.param, chat=False)
    if request.param == "bert":  # WordPiece, as a decoder has it
        built.eos_token = built.sep_token
    return built


def encode(tokenizer: Any, form: PromptFormat, source: str, answer: str) -> tuple[list[int], ...]:
    """Return the token ids of the prompt and of the answer of a row."""
    (row,) = encode_causal(tokenizer, [SourceTarget(source, answer, 0)], form)
    start = next(i for i, label in enumerate(row.labels) if label != IGNORED)  # type: ignore[arg-type]
    assert row.labels == [IGNORED] * start + row.input_ids[start:]
    assert row.input_ids[-1] == tokenizer.eos_token_id
    return row.input_ids[:start], row.input_ids[start:-1]


def natural(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` without the EOS token that some tokenizers add."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("separator", ["cue", "\n", ""])
def test_a_row_has_the_tokens_of_its_text(tokenizer: Any, separator: str) -> None:
    form = choose_format(tokenizer, "decoder", *(CUE.values() if separator == "cue" else ("", "")))
    if separator == "\n":
        form = form.resolve_separator([SourceTarget("a", "b", 0)])
    for source in SOURCES:
        for answer in ANSWERS:
            prompt, target = encode(tokenizer, form, source, answer)
            assert prompt == encode_prompt(tokenizer, form, source)
            text = f"{form.user_text(source)}\n\nSummary: " if separator == "cue" else source
            text += "" if text[-1:].isspace() else separator
            assert prompt == natural(tokenizer, text.removesuffix(" "))
            joined = text.removesuffix(" ") if answer[:1].isspace() else text
            assert prompt + target == natural(tokenizer, joined + answer)


def test_no_prompt_ends_in_the_token_of_a_lone_space(tokenizer: Any) -> None:
    cue = choose_format(tokenizer, "decoder", *CUE.values())
    for form, source in ((cue, "the name"), (PromptFormat("plain"), "the name: ")):
        ids = encode_prompt(tokenizer, form, source)
        assert tokenizer.decode(ids[-1:]).strip() == ":"
        _, answer = encode(tokenizer, form, source, "name")
        assert answer == natural(tokenizer, "x name")[len(natural(tokenizer, "x")) :]


def test_an_answer_that_joins_the_end_of_its_prompt() -> None:
    """The prompt has the tokens of generation, and the answer is no word of its own."""
    form = PromptFormat("plain")
    for family in ("qwen2", "llama"):
        tokenizer = build_tokenizer(family, chat=False)
        prompt, answer = encode(tokenizer, form, "the na", "me")
        assert prompt == encode_prompt(tokenizer, form, "the na") == natural(tokenizer, "the na")
        assert prompt + answer != natural(tokenizer, "the name")
        assert tokenizer.decode(prompt + answer, skip_special_tokens=True) == "the name"


def test_rows_say_what_stands_before_an_answer() -> None:
    plain = PromptFormat("plain")
    assert plain.resolve_separator([PlainText("a b", 0)]).separator == ""
    assert (
        plain.resolve_separator([SourceTarget("a", " b", 0), SourceTarget("c\n", "d", 1)]).separator
        == ""
    )
    assert (
        plain.resolve_separator([SourceTarget("a", " b", 0), SourceTarget("c", "d", 1)]).separator
        == "\n"
    )
    assert plain.resolve_separator([SourceTarget("a", " b", 0)], version=1).separator == "\n"
    assert plain.resolve_separator([PlainText("a b", 0)], version=1).separator == ""
    chat = PromptFormat("chat-template")
    assert chat.resolve_separator([SourceTarget("a", "b", 0)]) is chat


def test_version_1_has_the_space_in_the_prompt() -> None:
    tokenizer = build_tokenizer("gpt2", chat=False)
    form = PromptFormat("plain", **CUE, version=1)
    prompt, answer = encode(tokenizer, form, "the name", "configuration")
    text = "Summarize the following text.\n\nthe name\n\nSummary: "
    assert prompt == encode_prompt(tokenizer, form, "the name") == natural(tokenizer, text)
    assert answer == natural(tokenizer, "configuration")
    assert tokenizer.decode(prompt[-1:]) == " "


def write_old_card(folder: Path, **fields: Any) -> AdapterCard:
    folder.mkdir(exist_ok=True)
    (folder / CARD).write_text(json.dumps({**OLD_CARD, **fields}))
    return load_card(folder)


@pytest.mark.parametrize(
    ("fields", "shown", "separator"),
    [
        ({}, "prompt + completion: 'prompt', 'completion'", "\n"),
        ({"data": {"name": "x", "columns": {"text": "verse"}}}, "", ""),
        ({}, "text: 'text'", ""),
        ({"data": {}}, "", ""),
    ],
    ids=["pairs", "a mapped text", "a text by the summary", "not trained by ftlevel"],
)
def test_a_card_without_a_version(
    fields: dict[str, Any], shown: str, separator: str, tmp_path: Path
) -> None:
    if shown:
        (tmp_path / CONFIG).write_text("")
        (tmp_path / SUMMARY).write_text(json.dumps({"data": {"format": shown}}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    form = load_prompt_format(write_old_card(tmp_path / "adapter", **fields))
    assert form == PromptFormat("plain", separator=separator, version=1)


@pytest.mark.parametrize("kind", ["plain", "chat-template", "seq2seq"])
def test_a_format_is_read_as_it_was_written(kind: Any, tmp_path: Path) -> None:
    form = PromptFormat(kind, "Do it.", separator="\n" if kind == "plain" else "")
    assert ("version" in form.to_dict()) == (kind == "plain")
    assert load_prompt_format(write_old_card(tmp_path, prompt=form.to_dict())) == form


def test_a_format_of_a_later_version_is_refused(tmp_path: Path) -> None:
    for more in ({"version": 3}, {"version": 2, "suffix": "x"}):
        card = write_old_card(tmp_path, prompt={**OLD_CARD["prompt"], **more})
        with pytest.raises(InputError, match=r"a later ftlevel lays out. Install that version"):
            load_prompt_format(card)
    with pytest.raises(InputError, match="is not the card of an adapter"):
        write_old_card(tmp_path, prompt=["plain"])


def test_an_empty_prompt_has_no_token_to_begin_with() -> None:
    tokenizer = build_tokenizer("gpt2", chat=False)
    for text in ("", " "):
        with pytest.raises(InputError, match="the prompt is empty"):
            encode_prompt(tokenizer, PromptFormat("plain"), text)
