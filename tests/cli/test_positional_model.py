"""A model that is named without a flag is called in errors what the user typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftlevel.cli.app import run

COMMANDS = {
    "generate": ["--prompt", "x"],
    "evaluate": ["--dataset", "rows.jsonl"],
    "quantize": ["--quant", "4bit", "--out", "x"],
    "list-targets": [],
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def says(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Return the only line with which `command` is refused."""
    assert run(list(command)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("ftlevel: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = says(capsys, command, "./gone", *COMMANDS[command])
    assert said.startswith("./gone does not exist.")
    assert "--model" not in said


@pytest.mark.parametrize("command", ["generate", "evaluate", "quantize"])
@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "broken has no config.json"),
        ({"config.json": "{}"}, "broken holds no weights."),
        ({"config.json": '{"model_type": "nope"}', "model.safetensors": ""}, "broken: "),
    ],
)
def test_a_directory_that_is_no_model(
    command: str, files: dict[str, str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken").mkdir()
    for name, text in files.items():
        Path("broken", name).write_text(text, encoding="utf-8")
    said = says(capsys, command, "broken", *COMMANDS[command])
    assert said.startswith(complaint)
    assert "--model" not in said


def test_a_base_that_the_user_did_not_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "./gone"}
    Path("mine").mkdir()
    Path("mine/adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    Path("mine/adapter_model.safetensors").touch()
    said = says(capsys, "generate", "mine", "--prompt", "x")
    assert said.startswith("./gone (the base of mine) does not exist.")


def test_against(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "builtin:tiny-llama", "--dataset", "rows.jsonl", "--against", "./gone"]
    assert says(capsys, *command).startswith("--against ./gone does not exist.")
