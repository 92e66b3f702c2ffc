"""A directory that is absent or whole."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from ftlevel.artifacts.checkpoints import certify
from ftlevel.artifacts.files import (
    atomic_directory,
    atomic_files,
    check_new_output,
    format_interrupt,
    write_text,
)
from ftlevel.errors import ConfigError


def test_it_is_there_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_directory(target) as place:
        (place / "a").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_nothing_is_left_when_the_block_raises(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_directory(tmp_path / "out") as place:
            (place / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("x")
    with atomic_directory(tmp_path / "out") as place:
        (place / "a").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("full", "exists and is not empty"),
        ("file", "already exists and is not overwritten. Choose another."),
    ):
        with pytest.raises(ConfigError, match=f"--out .*{name} {said}"):
            check_new_output("--out", tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_new_output("--out", tmp_path / "file" / "out")
    check_new_output("--out", tmp_path / "empty")
    with atomic_directory(tmp_path / "empty") as place:
        (place / "a").write_text("x")
    assert (tmp_path / "empty" / "a").is_file()


def test_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a", tmp_path / "new" / "b"
    with atomic_files(first, second) as place:
        (place / "a").write_text("1")
        (place / "b").write_text("2")
        (place / "scratch").write_text("3")
        assert not first.exists()
    assert sorted(path.name for path in first.parent.iterdir()) == ["a", "b"]

    def broken() -> None:
        with atomic_files(first, second) as place:
            (place / "a").write_text("other")  # b was not written

    with pytest.raises(FileNotFoundError):
        broken()
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert sorted(path.name for path in first.parent.iterdir()) == ["a", "b"]


def test_a_signal_while_it_is_tidied_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, came = shutil.rmtree, []
    # A process of the command line writes one thing; this one has written what other tests did.
    monkeypatch.setattr("ftlevel.artifacts.files._outputs", [])

    def interrupted(path: Path, **settings: bool) -> None:
        if not came:
            came.append(path)
            raise KeyboardInterrupt
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_files(tmp_path / "a") as partial:
        (partial / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(shutil, "rmtree", remove)
    a = tmp_path / "a"
    assert format_interrupt() == f"interrupted; {a} was written before that, and is whole."


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_names_are_flushed_as_bytes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink())
    )

    def names() -> list[str]:
        found = [os.path.relpath(path, tmp_path) for path in flushed]
        flushed.clear()
        return found

    write_text(tmp_path / "a", "x")
    assert names() == [".a.partial", "."]
    with atomic_directory(tmp_path / "out") as place:
        (place / "in").mkdir()
        (place / "in" / "a").write_text("x")
    assert names() == [".out.partial/in", ".out.partial/in/a", ".out.partial", "."]
    with atomic_files(tmp_path / "one") as place:
        (place / "one").write_text("x")
    assert names() == [".one.partial/one", "."]
    certify(tmp_path / "out")
    assert names() == ["out/in", "out/in/a", "out", "out/.manifest.json.partial", "out", "."]
