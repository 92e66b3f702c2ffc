"""`--push-to-hub`: refused before training, uploaded after verification; network mocked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from export_cases import exportable
from ftlevel.artifacts.hub import get_repo_id
from ftlevel.cli.app import run
from ftlevel.errors import ConfigError

ME = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
SHORT = ["--max-samples", "8", "--max-length", "96", "--overlong", "drop", "--quiet",
         "--max-steps", "1", "--eval-strategy", "no", "--output-dir", "run"]  # fmt: skip


class Made:
    repo_id = "me/mine"

    def __str__(self) -> str:
        return "https://huggingface.co/me/mine"


def answer(monkeypatch: pytest.MonkeyPatch, name: str, said: Any, heard: list[Any]) -> None:
    """Let the Hub say or raise `said` where `HfApi.name` asks it."""

    def ask(_: HfApi, *arguments: Any, **named: Any) -> Any:
        heard.append((name, *arguments, named))
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(HfApi, name, ask)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.chdir(tmp_path)
    told: list[Any] = []
    answer(monkeypatch, "whoami", ME, told)
    answer(monkeypatch, "create_repo", Made(), told)
    answer(monkeypatch, "upload_folder", None, told)
    return told


@pytest.mark.slow
def test_what_was_trained_is_uploaded(heard: list[Any]) -> None:
    assert run(["train", *SHORT, "--push-to-hub", "mine", "--hub-private"]) == 0
    names = [call[0] for call in heard]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert heard[1][1:] == ("me/mine", {"private": True, "exist_ok": True})
    folder = heard[2][1]["folder_path"]
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "README.md").is_file()
    assert json.loads(Path("run/summary.json").read_text())["hub"] == str(Made())
    assert "push_to_hub" not in Path("run/config.yaml").read_text()  # which makes another run


@pytest.mark.slow
def test_an_upload_that_fails_leaves_the_run_whole(
    heard: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, "upload_folder", OSError("no route to host\nmore"), heard)
    assert run(["train", *SHORT, "--push-to-hub", "us/mine"]) == 1
    said = capsys.readouterr().err
    assert (
        "the upload failed (no route to host). The result is complete on this disk. Upload it with:"
        in said
    )
    assert "Upload it with: hf upload us/mine run/adapter" in said
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["proof"]["reload_difference"] == 0.0
    assert "hub" not in summary


@pytest.mark.slow
def test_what_other_commands_write_is_uploaded(
    heard: list[Any], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """`quantize` uploads a directory, `export` its own files alone."""
    model = str(exportable(tiny_model_dir, tmp_path, "llama"))
    pushed = ["--push-to-hub", "mine", "--quiet"]
    assert run(["quantize", model, "--quant", "8bit", "--no-measure", "--out", "q", *pushed]) == 0
    assert heard[2][1]["folder_path"] == Path("q")
    assert heard[2][1]["allow_patterns"] is None
    Path("beside").write_text("not ours", encoding="utf-8")
    assert run(["export", model, "--no-verify", "--out", "m.gguf", *pushed]) == 0
    assert heard[5][1]["folder_path"] == Path()
    assert heard[5][1]["allow_patterns"] == ["m.gguf", "m.Modelfile"]
    assert [call[0] for call in heard] == ["whoami", "create_repo", "upload_folder"] * 2


@pytest.mark.parametrize("command", ["merge", "quantize", "export"])
def test_other_commands_ask_the_hub_before_they_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, "whoami", LocalTokenNotFoundError("x"), [])
    quant = ["--quant", "4bit"] if command == "quantize" else []
    out = "absent.gguf" if command == "export" else "new"
    assert run([command, "absent", *quant, "--out", out, "--push-to-hub", "mine"]) == 2
    assert "not logged in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said", "told"),
    [
        ("a b", ME, "is no name of a repository"),
        (
            "mine",
            LocalTokenNotFoundError("x"),
            "not logged in. Run hf auth login, or set HF_TOKEN.",
        ),
        ("mine", ConnectionError("no network"), "the Hub is not reachable (no network). Nothing"),
        ("them/mine", ME, "me cannot write to them. Owners here: me, us."),
        (
            "mine",
            {**ME, "auth": {"accessToken": {"role": "read"}}},
            "the token is read-only. Log in with a write token: hf auth login.",
        ),
    ],
)
def test_what_is_refused_before_weights_are_read(
    name: str, said: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "whoami", said, [])
    with pytest.raises(ConfigError) as caught:
        get_repo_id(name)
    assert told in str(caught.value)


def test_a_private_repository_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--hub-private", "--dry-run"]) == 2
    assert "Add --push-to-hub NAME, or drop it." in capsys.readouterr().err
