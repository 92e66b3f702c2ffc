"""The Modelfile: Go's template with every character of the prompt, and quoted stops."""

from __future__ import annotations

from ftlevel.merging.formats.ollama import chat_template, format_modelfile, literal

CHATML = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
}


def test_actions_of_go_in_a_prompt_are_text() -> None:
    assert literal("{{ x }}") == '{{ "{{" }} x }}'
    assert '"""' not in literal('a """ b')


def test_a_turn_is_its_texts_and_its_content() -> None:
    template = chat_template(CHATML, "", "<|im_start|>assistant\n")
    assert '{{ if eq $turn.Role "system" }}<|im_start|>system\n{{ $turn.Content }}' in template
    assert '{{ else if eq $turn.Role "user" }}<|im_start|>user\n{{ $turn.Content }}' in template
    assert "{{ if not $last }}<|im_end|>\n{{ end }}" in template
    assert template.endswith('"assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}')
    assert "{{-" not in template
    assert "-}}" not in template


def test_an_opening_is_for_a_talk_without_system_text() -> None:
    template = chat_template(CHATML, "<s>Be kind.", "", start="<s>")
    assert '{{ if eq $index 0 }}{{ if ne $turn.Role "system" }}Be kind.{{ end }}{{ end }}' in (
        template
    )


def test_what_is_put_before_the_text_anyway_is_left_out_of_the_first_turn() -> None:
    around = {"user": ("<s>[INST] ", " [/INST]"), "assistant": ("", "</s>")}
    template = chat_template(around, "", "", start="<s>")
    assert '"user" }}{{ if gt $index 0 }}<s>{{ end }}[INST] {{ $turn.Content }}' in template
    assert "{{ if gt" not in chat_template(around, "", "")


def test_a_modelfile_names_the_file_beside_it() -> None:
    text = format_modelfile("m.gguf", "{{ .Prompt }}", ['"', "</s>"], ["one", "two"])
    assert text.splitlines() == [
        "# one",
        "# two",
        "FROM ./m.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "\\""',
        'PARAMETER stop "</s>"',
    ]
    assert "TEMPLATE" not in format_modelfile("m.gguf", None, [], [])
