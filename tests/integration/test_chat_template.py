"""A chat template given for training is saved with the adapter and used in generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.data.encoding.prompts import encode_prompt
from ftlevel.trained.resolve import resolve_model

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the argument"},
    {"role": "assistant", "content": "the file"},
    {"role": "user", "content": "the value"},
    {"role": "assistant", "content": "an object"},
]


@pytest.mark.slow
def test_chat_template_is_saved_and_used_for_generation(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], cli: Cli
) -> None:
    data = tmp_path / "talk.jsonl"
    rows = [
        {"messages": [*CONVERSATION[:4], {**CONVERSATION[4], "content": f"object {i}"}]}
        for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = ["--model", str(tiny_model_dir("llama", chat=False)), "--dataset", str(data)]
    error = cli.fails("train --dry-run", *model)
    assert (
        f"{data}:1: is a conversation of 5 messages, and the model has no chat template. "
        "Add --chat-template mistral, or"
    ) in error
    out = tmp_path / "run"
    arguments = [*model, "--chat-template", "mistral", "--max-steps", "2", "--learning-rate",
                 "0.01", "--output-dir", str(out), "--validation-split", "0.2"]  # fmt: skip
    assert "chat template: mistral (the model has none)" in cli("train", *arguments)
    assert "[INST]" in (out / "adapter/chat_template.jinja").read_text(encoding="utf-8")
    trained = resolve_model(str(out), device="cpu").load("cpu")
    assert trained.ref.prompt_format is not None
    ids = encode_prompt(trained.tokenizer, trained.ref.prompt_format, "the value")
    assert trained.tokenizer.decode(ids) == "<s>[INST] the value [/INST]"
    cli(f"generate {out} --prompt 'the value' --device cpu")
