"""Fetching wheels: checksums, cached files, and errors."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

import fetch_models
import wheels
from wheels import FetchError, NoNetworkError, Package, fetch_wheel, put_in_place, unpack

NAME = "toy_text-1.0-py3-none-any.whl"
CONTENT = b"not really a wheel"
TOY_PACKAGE = Package("toy-text", "1.0", hashlib.sha256(CONTENT).hexdigest())


def fake_pip(content=None, stderr="", commands=None):
    """Return a stand-in for pip that writes `content` to --dest or fails with `stderr`."""

    def run(command, **options):
        if commands is not None:
            commands.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], NAME).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    return run


def test_a_wheel_is_fetched_once(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(CONTENT, commands=commands))
    assert {fetch_wheel(TOY_PACKAGE, tmp_path) for _ in range(2)} == {tmp_path / NAME}
    (command,) = commands
    assert {"toy-text==1.0", "--no-deps"} <= set(command)
    assert "--platform" not in command


def test_compiled_package_is_fetched_for_platform(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(CONTENT, commands=commands))
    fetch_wheel(Package("toy-text", "1.0", TOY_PACKAGE.sha256, abi="cp311"), tmp_path)
    assert commands[0][commands[0].index("--python-version") + 1] == "311"
    assert "manylinux2014_x86_64" in commands[0]


def test_wrong_digest_raises_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(b"something else"))
    with pytest.raises(FetchError, match=rf"expected {TOY_PACKAGE.sha256}"):
        fetch_wheel(TOY_PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "error", "text"),
    [
        ("WARNING: Retrying after NewConnectionError(...)", NoNetworkError, "Cannot reach"),
        ("/usr/bin/python: No module named pip", FetchError, "ensurepip"),
        ("ERROR: a\nERROR: No matching distribution", FetchError, "No matching distribution"),
        ("", FetchError, "no message"),
    ],
)
def test_pip_failures_raise_with_advice(tmp_path, monkeypatch, stderr, error, text):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(stderr=stderr))
    with pytest.raises(FetchError, match=text) as failure:
        fetch_wheel(TOY_PACKAGE, tmp_path)
    assert type(failure.value) is error


def test_unpack_extracts_only_matching_members(tmp_path):
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/other.py", "")
    unpack(tmp_path / NAME, tmp_path / "out", ["*/model/*.json"])
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["out/toy/model/config.json", NAME]


def test_existing_directory_is_not_replaced(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    put_in_place(ours, theirs)
    assert (theirs / "file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_existing_models_are_not_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(stderr="must not be called"))
    for model in fetch_models.MODELS:
        for name in model.outputs:
            (tmp_path / name).mkdir()
    assert fetch_models.main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already in") == 2


def test_no_network_exits_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels.subprocess, "run", fake_pip(stderr="NameResolutionError"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_models.main(["minilm", "--dir", str(tmp_path)]) == 3
    assert "--wheels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_list_shows_installed_models(tmp_path, capsys):
    (tmp_path / fetch_models.MINILM_NAME).mkdir()
    assert fetch_models.main(["--list", "--dir", str(tmp_path)]) == 0
    smollm2, minilm = (line for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert "not fetched" in smollm2
    assert "here" in minilm
    assert "Apache-2.0" in minilm
