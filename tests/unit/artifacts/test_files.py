"""Atomic writes: a file or directory is absent or complete."""

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


def test_atomic_directory_appears_after_block(tmp_path):
    target = tmp_path / "new" / "out"
    stale = target.parent / ".out.partial"
    stale.mkdir(parents=True)
    (stale / "stale").write_text("x")
    with atomic_directory(target) as partial:
        (partial / "a").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_atomic_directory_leaves_nothing_after_error(tmp_path):
    def interrupt() -> None:
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_replaced(tmp_path):
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    for name in ("full/mine", "file"):
        (tmp_path / name).write_text("x")
    for name, message in (
        ("full", "full exists and is not empty"),
        ("file", "file already exists and is not overwritten. Choose another."),
        ("file/out", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=f"--out .*{message}"):
            check_new_output("--out", tmp_path / name)
    check_new_output("--out", tmp_path / "empty")
    with atomic_directory(tmp_path / "empty") as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "empty" / "a").is_file()


def test_directory_that_cannot_be_replaced_is_rejected_before_block(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "target")
    for path in (tmp_path / "link", Path(), tmp_path / "target"):
        with pytest.raises(ConfigError, match="Name a new directory in it"):
            atomic_directory(path).__enter__()


def test_atomic_files_are_replaced_together(tmp_path):
    first, second = tmp_path / "new" / "a", tmp_path / "new" / "b"
    with atomic_files(first, second) as partial:
        (partial / "a").write_text("1")
        (partial / "b").write_text("2")
        (partial / "scratch").write_text("3")
        assert not first.exists()
    assert sorted(path.name for path in first.parent.iterdir()) == ["a", "b"]

    def write_incomplete() -> None:
        with atomic_files(first, second) as partial:
            (partial / "a").write_text("other")  # b was not written

    with pytest.raises(FileNotFoundError):
        write_incomplete()
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert sorted(path.name for path in first.parent.iterdir()) == ["a", "b"]


def test_interrupt_during_cleanup_leaves_no_partial_files(tmp_path, monkeypatch):
    remove, calls = shutil.rmtree, []
    # A command writes one output; this process has written those of other tests.
    monkeypatch.setattr("ftlevel.artifacts.files._outputs", [])

    def interrupt_once(path: Path, **settings: bool) -> None:
        if not calls:
            calls.append(path)
            raise KeyboardInterrupt
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", interrupt_once)
    with pytest.raises(KeyboardInterrupt), atomic_files(tmp_path / "a") as partial:
        (partial / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(shutil, "rmtree", remove)
    a = tmp_path / "a"
    assert format_interrupt() == f"interrupted; {a} was written before and is complete."


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_atomic_writes_flush_files_and_directories(tmp_path, monkeypatch):
    flushed = []

    def record(fd):
        flushed.append(os.path.relpath(Path(f"/proc/self/fd/{fd}").readlink(), tmp_path))

    def names():
        before = flushed.copy()
        flushed.clear()
        return before

    monkeypatch.setattr(os, "fsync", record)
    write_text(tmp_path / "a", "x")
    assert names() == [".a.partial", "."]
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "in").mkdir()
        (partial / "in" / "a").write_text("x")
    assert names() == [".out.partial/in", ".out.partial/in/a", ".out.partial", "."]
    with atomic_files(tmp_path / "one") as partial:
        (partial / "one").write_text("x")
    assert names() == [".one.partial/one", "."]
    certify(tmp_path / "out")
    assert names() == ["out/in", "out/in/a", "out", "out/.manifest.json.partial", "out", "."]
