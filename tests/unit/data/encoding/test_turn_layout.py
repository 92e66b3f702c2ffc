"""Chat templates expressed as fixed texts around turns."""

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
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + "
    "m['content'] + '\n<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}"
    "{{ '' if loop.previtem and loop.previtem['role'] == 'system' else bos_token + '[INST] ' }}"
    "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
NUMBERED_TEMPLATE = "{% for m in messages %}[{{ loop.index }}] {{ m['content'] }}\n{% endfor %}"
UPPERCASE_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi\nthere"},
    {"role": "user", "content": "And?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer_with_template(template: str | None, family: str = "qwen2") -> Any:
    tokenizer = build_tokenizer(family, chat=True)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "has_system"),
    [
        (tokenizer_with_template(None), True),
        (tokenizer_with_template(None, "llama"), True),
        (tokenizer_with_template(None, "gemma3_text"), False),
        (tokenizer_with_template(None, "phi3"), True),
        (tokenizer_with_template(DEFAULT_SYSTEM), True),
        (published.build("llama-3"), True),
        (published.build("gemma-3"), True),  # inside the first user turn
        (tokenizer_with_template(LLAMA_2, "llama"), True),
        (published.build("mistral"), False),  # in the last user turn
    ],
)
def test_layout_renders_like_template(tokenizer, has_system):
    layout = get_chat_layout(tokenizer)
    assert ("system" in layout.around) is has_system
    for chat in (CHAT[:1], CHAT, [SYSTEM, *CHAT] if has_system else CHAT):
        assert layout.render(chat) == render(tokenizer, chat, generation_prompt=True)


def test_default_system_text_is_the_opening():
    layout = get_chat_layout(tokenizer_with_template(DEFAULT_SYSTEM))
    assert layout.opening == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert layout.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert layout.generation == "<|im_start|>assistant\n"


def test_special_tokens_are_not_split():
    layout = get_chat_layout(published.build("mistral"))  # <s>[INST] and </s>[INST]
    assert layout.opening == "<s>"
    assert layout.around == {"user": ("[INST] ", "[/INST]"), "assistant": (" ", "</s>")}


@pytest.mark.parametrize("template", [NUMBERED_TEMPLATE, UPPERCASE_TEMPLATE])
def test_template_beyond_fixed_texts_has_no_layout(template):
    assert get_chat_layout(tokenizer_with_template(template)) is None
