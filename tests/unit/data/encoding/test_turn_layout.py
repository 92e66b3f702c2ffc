"""Chat templates as fixed texts around turns."""

from __future__ import annotations

from typing import Any

import pytest

import published_chat_templates as published
from ftlevel.data.encoding.chat import get_chat_layout, render
from tiny_tokenizers import CHATML, build_tokenizer

LOOP = "{% for message in messages %}"
DEFAULT_SYSTEM = CHATML.replace(
    LOOP,
    LOOP + "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}",
)
COUNTED = "{% for m in messages %}[{{ loop.index }}] {{ m['content'] }}\n{% endfor %}"
SHOUTED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}\n{% endfor %}"
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi\nthere"},
    {"role": "user", "content": "And?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def with_template(template: str | None, family: str = "qwen2") -> Any:
    tokenizer = build_tokenizer(family, chat=True)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "has_system"),
    [
        (with_template(None), True),
        (with_template(None, "llama"), True),
        (with_template(None, "gemma3_text"), False),
        (with_template(None, "phi3"), True),
        (with_template(DEFAULT_SYSTEM), True),
        (published.build("llama-3"), True),
        (published.build("gemma-3"), False),
        (published.build("mistral"), False),
    ],
)
def test_a_layout_gives_what_the_template_gives(tokenizer: Any, has_system: bool) -> None:
    layout = get_chat_layout(tokenizer)
    assert layout is not None
    assert ("system" in layout.around) is has_system
    for talk in (TALK[:1], TALK, [SYSTEM, *TALK] if has_system else TALK):
        assert layout.render(talk) == render(tokenizer, talk, generation_prompt=True)


def test_a_default_system_text_opens() -> None:
    layout = get_chat_layout(with_template(DEFAULT_SYSTEM))
    assert layout is not None
    assert layout.opening == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert layout.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert layout.generation == "<|im_start|>assistant\n"


def test_a_token_is_not_cut_where_two_end_alike() -> None:
    layout = get_chat_layout(published.build("mistral"))  # <s>[INST] and </s>[INST]
    assert layout is not None
    assert layout.opening == "<s>"
    assert layout.around == {"user": ("[INST] ", "[/INST]"), "assistant": (" ", "</s>")}


@pytest.mark.parametrize("template", [COUNTED, SHOUTED])
def test_what_is_more_than_fixed_texts_has_none(template: str) -> None:
    assert get_chat_layout(with_template(template)) is None
