"""Errors name a positional model as the user typed it, without a flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Cli

COMMANDS = {
    "generate": ["--prompt", "x"],
    "evaluate": ["--dataset", "rows.jsonl"],
    "quantize": ["--quant", "4bit", "--out", "x"],
    "list-targets": [],
}


@pytest.fixture(autouse=True)
def empty_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def get_error(cli: Cli, *command: str) -> str:
    """Run `command`, which must fail, and return its one-line error."""
    lines = cli.fails(*command).splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("ftlevel: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_model_is_named_without_flag(command: str, cli: Cli) -> None:
    error = get_error(cli, command, "./gone", *COMMANDS[command])
    assert error.startswith("./gone does not exist.")
    assert "--model" not in error


@pytest.mark.parametrize("command", ["generate", "evaluate", "quantize"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "broken has no config.json"),
        ({"config.json": "{}"}, "broken holds no weights."),
        ({"config.json": '{"model_type": "nope"}', "model.safetensors": ""}, "broken: "),
    ],
)
def test_invalid_model_directory_is_named_without_flag(
    command: str, files: dict[str, str], message: str, cli: Cli
) -> None:
    Path("broken").mkdir()
    for name, text in files.items():
        Path("broken", name).write_text(text, encoding="utf-8")
    error = get_error(cli, command, "broken", *COMMANDS[command])
    assert error.startswith(message)
    assert "--model" not in error


def test_missing_base_of_adapter_is_named(cli: Cli) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "./gone"}
    Path("mine").mkdir()
    Path("mine/adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    Path("mine/adapter_model.safetensors").touch()
    error = get_error(cli, "generate", "mine", "--prompt", "x")
    assert error.startswith("./gone (the base of mine) does not exist.")


def test_missing_against_model_is_named_with_flag(cli: Cli) -> None:
    command = ["evaluate", "builtin:tiny-llama", "--dataset", "rows.jsonl", "--against", "./gone"]
    assert get_error(cli, *command).startswith("--against ./gone does not exist.")
