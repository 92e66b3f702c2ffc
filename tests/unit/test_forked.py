"""A forked process of the program is as one of a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import forked


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list-methods"], 0),
        (["recipes", "copy", "demo", "own.yaml"], 0),
        (["train", "--lora-r", "0"], 2),
    ],
)
def test_it_writes_and_ends_as_the_program(arguments: list[str], code: int, tmp_path: Path) -> None:
    found = []
    for name, run in (
        ("real", lambda cwd: subprocess.run(
            [sys.executable, "-m", "ftlevel", *arguments], cwd=cwd, capture_output=True, text=True,
            check=False,
        )),
        ("forked", lambda cwd: forked.run(*arguments, cwd=cwd, check=False)),
    ):  # fmt: skip
        cwd = tmp_path / name / "same"
        cwd.mkdir(parents=True)
        done = run(cwd)
        files = {path.name: path.read_bytes() for path in cwd.iterdir()}
        found.append((done.returncode, done.stdout, done.stderr, files))
    assert found[0] == found[1]
    assert found[1][0] == code
