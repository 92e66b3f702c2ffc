"""`--push-to-hub`: checks before training, upload after verification; the network is mocked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from command_line import Cli
from export_cases import exportable_model
from ftlevel.artifacts.hub import get_repo_id
from ftlevel.errors import ConfigError
from run_files import ModelDir

ACCOUNT = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
SHORT = ["--max-samples", "8", "--max-length", "96", "--overlong", "drop", "--quiet",
         "--max-steps", "1", "--eval-strategy", "no", "--output-dir", "run"]  # fmt: skip


class CreatedRepo:
    repo_id = "me/mine"

    def __str__(self) -> str:
        return "https://huggingface.co/me/mine"


def mock_hub_call(
    monkeypatch: pytest.MonkeyPatch, name: str, response: Any, calls: list[Any]
) -> None:
    """Replace `HfApi.name` by a function that records the call and returns or raises `response`."""

    def respond(_: HfApi, *arguments: Any, **kwargs: Any) -> Any:
        calls.append((name, *arguments, kwargs))
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr(HfApi, name, respond)


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []
    mock_hub_call(monkeypatch, "whoami", ACCOUNT, calls)
    mock_hub_call(monkeypatch, "create_repo", CreatedRepo(), calls)
    mock_hub_call(monkeypatch, "upload_folder", None, calls)
    return calls


@pytest.mark.slow
def test_trained_adapter_is_uploaded(hub_calls: list[Any], cli: Cli) -> None:
    cli("train", *SHORT, "--push-to-hub mine --hub-private")
    names = [call[0] for call in hub_calls]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert hub_calls[1][1:] == ("me/mine", {"private": True, "exist_ok": True})
    folder = hub_calls[2][1]["folder_path"]
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "README.md").is_file()
    assert json.loads(Path("run/summary.json").read_text())["hub"] == str(CreatedRepo())
    assert "push_to_hub" not in Path("run/config.yaml").read_text()  # config.yaml is for a new run


@pytest.mark.slow
def test_failed_upload_keeps_run(
    hub_calls: list[Any], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    mock_hub_call(monkeypatch, "upload_folder", OSError("no route to host\nmore"), hub_calls)
    message = cli.fails("train", *SHORT, "--push-to-hub us/mine", code=1)
    assert (
        "the upload failed (no route to host). The result is complete on this disk. Upload it with:"
        in message
    )
    assert "Upload it with: hf upload us/mine run/adapter" in message
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["proof"]["reload_difference"] == 0.0
    assert "hub" not in summary


@pytest.mark.slow
def test_quantize_and_export_upload_their_outputs(
    hub_calls: list[Any], tiny_model_dir: ModelDir, tmp_path: Path, cli: Cli
) -> None:
    """`quantize` uploads a directory, `export` only its own files."""
    model = str(exportable_model(tiny_model_dir, tmp_path, "llama"))
    push_options = ["--push-to-hub", "mine", "--quiet"]
    cli(f"quantize {model} --quant 8bit --no-measure --out q", *push_options)
    assert hub_calls[2][1]["folder_path"] == Path("q")
    assert hub_calls[2][1]["allow_patterns"] is None
    Path("beside").write_text("not ours", encoding="utf-8")
    cli(f"export {model} --no-verify --out m.gguf", *push_options)
    assert hub_calls[5][1]["folder_path"] == Path()
    assert hub_calls[5][1]["allow_patterns"] == ["m.gguf", "m.Modelfile"]
    assert [call[0] for call in hub_calls] == ["whoami", "create_repo", "upload_folder"] * 2


@pytest.mark.parametrize("command", ["merge", "quantize", "export"])
def test_missing_login_is_reported_before_work(
    command: str, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    mock_hub_call(monkeypatch, "whoami", LocalTokenNotFoundError("x"), [])
    quant = ["--quant", "4bit"] if command == "quantize" else []
    out = "absent.gguf" if command == "export" else "new"
    error = cli.fails(command, "absent", *quant, f"--out {out} --push-to-hub mine")
    assert "not logged in" in error


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [
        ("a b", ACCOUNT, "is not a valid repository name"),
        (
            "mine",
            LocalTokenNotFoundError("x"),
            "not logged in. Run hf auth login, or set HF_TOKEN.",
        ),
        ("mine", ConnectionError("no network"), "the Hub is not reachable (no network). Nothing"),
        ("them/mine", ACCOUNT, "me cannot write to them. Owners here: me, us."),
        (
            "mine",
            {**ACCOUNT, "auth": {"accessToken": {"role": "read"}}},
            "the token is read-only. Log in with a write token: hf auth login.",
        ),
    ],
)
def test_invalid_repository_or_token_raises(
    name: str, response: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock_hub_call(monkeypatch, "whoami", response, [])
    with pytest.raises(ConfigError) as error:
        get_repo_id(name)
    assert message in str(error.value)


def test_hub_private_requires_push_to_hub(cli: Cli) -> None:
    error = cli.fails("train --hub-private --dry-run")
    assert "Add --push-to-hub NAME, or drop --hub-private." in error
