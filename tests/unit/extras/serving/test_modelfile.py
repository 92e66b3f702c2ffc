"""Ollama Modelfiles: prompts escaped for Go templates, quoted stop strings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import published_chat_templates
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.extras.serving.ollama import (
    chat_template,
    escape_template,
    format_modelfile,
    get_prompt_template,
    modelfile,
)

CHATML = {
    role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")
}


def test_go_template_actions_in_prompt_are_escaped():
    assert escape_template("{{ x }}") == '{{ "{{" }} x }}'
    assert '"""' not in escape_template('a """ b')


def test_chat_template_wraps_each_turn():
    template = chat_template(CHATML, "", "<|im_start|>assistant\n")
    assert '{{ if eq $turn.Role "system" }}<|im_start|>system\n{{ $turn.Content }}' in template
    assert '{{ else if eq $turn.Role "user" }}<|im_start|>user\n{{ $turn.Content }}' in template
    assert "{{ if not $last }}<|im_end|>\n{{ end }}" in template
    assert template.endswith('"assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}')
    assert "{{-" not in template
    assert "-}}" not in template


def test_default_system_text_is_used_without_system_turn():
    template = chat_template(CHATML, "<s>Be kind.", "", start="<s>")
    assert '{{ if eq $index 0 }}{{ if ne $turn.Role "system" }}Be kind.{{ end }}{{ end }}' in (
        template
    )


def get_trained_template(name, **prompt):
    """Return the template for a model trained with a published chat template and `prompt`."""
    card = SimpleNamespace(prompt=PromptFormat("chat-template", **prompt).to_dict())
    ref: Any = SimpleNamespace(card=card, configured_task=SimpleNamespace(stop_texts=()))
    vocab: Any = SimpleNamespace(flags={"add_bos_token": name != "chatml"})
    return get_prompt_template(published_chat_templates.build(name), ref, vocab)


@pytest.mark.parametrize(
    ("name", "has_template"), [("chatml", True), ("gemma-3", True), ("mistral", False)]
)
def test_system_text_of_training_reaches_the_prompt(name, has_template):
    text = modelfile("m.gguf", get_trained_template(name, system="Be kind."))
    assert ('TEMPLATE """' in text) == has_template  # Mistral has it inside the last user turn
    assert "SYSTEM is omitted" not in text
    assert 'SYSTEM """Be kind."""\n' in text


def test_system_text_inside_user_turn():
    template = get_trained_template("gemma-3", instruction="Shorten:").template
    system, user = template.partition('else if eq $turn.Role "user" }}')[::2]
    assert "<start_of_turn>user\n{{ $turn.Content }}\n\n{{ " in system
    assert user.startswith(
        '{{ if and (eq $index 1) (eq (index $.Messages 0).Role "system") }}Shorten:\n\n{{ else }}'
        "<start_of_turn>user\nShorten:\n\n{{ end }}{{ $turn.Content }}<end_of_turn>\n"
    )


def test_bos_is_omitted_from_first_turn():
    wrappers = {"user": ("<s>[INST] ", " [/INST]"), "assistant": ("", "</s>")}
    template = chat_template(wrappers, "", "", start="<s>")
    assert '"user" }}{{ if gt $index 0 }}<s>{{ end }}[INST] {{ $turn.Content }}' in template
    assert "{{ if gt" not in chat_template(wrappers, "", "")


def test_texts_end_neither_their_quotes_nor_their_line():
    stops, system = ['"""\nADAPTER /x', 'a"""b'], 'Be kind."""  \rADAPTER /x'
    text = format_modelfile("m\nADAPTER x.gguf", None, stops, ["a\rADAPTER y"], system)
    lines = text.splitlines()
    assert not any(line.startswith("ADAPTER") for line in lines)
    assert [line[:9] for line in lines[3:]] == ["FROM ./m\\", "PARAMETER"]
    assert 'PARAMETER stop """a"""b"""' in lines


def test_modelfile_lines():
    text = format_modelfile("m.gguf", "{{ .Prompt }}", ['"', "</s>", "\\n", "a\nb"], ["one", "two"])
    assert text.splitlines() == [
        "# one",
        "# two",
        "FROM ./m.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop """""""',  # unquote() of Ollama's parser/parser.go reads no escapes
        'PARAMETER stop "</s>"',
        'PARAMETER stop "\\n"',
        'PARAMETER stop "a',
        'b"',
    ]
    assert "TEMPLATE" not in format_modelfile("m.gguf", None, [], [])
