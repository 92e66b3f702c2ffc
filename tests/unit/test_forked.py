"""A forked process behaves like a new interpreter."""

from __future__ import annotations

import subprocess
import sys

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
def test_forked_process_matches_subprocess(arguments, code, tmp_path):
    results = []
    for name, run in (
        ("real", lambda cwd: subprocess.run(
            [sys.executable, "-m", "ftlevel", *arguments], cwd=cwd, capture_output=True, text=True,
            check=False,
        )),
        ("forked", lambda cwd: forked.run(*arguments, cwd=cwd, check=False)),
    ):  # fmt: skip
        cwd = tmp_path / name / "same"
        cwd.mkdir(parents=True)
        process = run(cwd)
        files = {path.name: path.read_bytes() for path in cwd.iterdir()}
        results.append((process.returncode, process.stdout, process.stderr, files))
    assert results[0] == results[1]
    assert results[1][0] == code
