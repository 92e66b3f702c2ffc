"""The core works without any one folder of `ftlevel.extras`, and without all of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import Forked
from run_files import ModelDir

SOURCE = Path(__file__).parents[2] / "src"
EXTRAS = sorted(path.parent.name for path in (SOURCE / "ftlevel/extras").glob("*/__init__.py"))
ALL = "all"
COMMANDS = {
    "compare": "compare",
    "launch": "launch",
    "retrieval": "mine",
    "serving": "export",
}
"""Extra → command that it adds."""
FLAGS = {"preference": "--reference", "rl": "--num-generations"}
"""Extra → flag of train that it adds."""


def run_without(source: str, commands: list[list[str]]) -> None:
    """Import ftlevel from `source`, and run several commands in this process."""
    import ftlevel
    from ftlevel.cli.app import run

    assert ftlevel.__file__.startswith(source), ftlevel.__file__
    for command in commands:
        assert run(command) == 0, command


@pytest.fixture(params=[*EXTRAS, ALL])
def removed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of an extra, and a folder with a copy of the package without it."""
    name, package = request.param, tmp_path / "source/ftlevel"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "ftlevel", package, ignore=ignored)
    shutil.rmtree(package / "extras" / ("" if name == ALL else name))
    yield name, package.parent
    shutil.rmtree(package.parent)


@pytest.mark.slow
def test_core_works_without_extra(
    removed: tuple[str, Path], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    name, source = removed
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_model_dir("llama"))
    data = ["--model", model, "--dataset", "rows.jsonl", "--max-steps", "1", "-q"]
    commands = [
        ["--help"],
        ["train", "--help-all"],
        ["list-targets", model],
        ["train", "--method", "lora", *data, "--output-dir", "lora"],
        ["evaluate", "lora", "--dataset", "rows.jsonl", "--no-base", "-q"],
    ]
    if name in (*FLAGS, ALL):
        commands.append(["train", "--method", "qlora", *data, "--output-dir", "qlora"])
    process = Forked(
        call=(run_without, (str(source), commands)), imported="libraries", cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert "cannot be used (" not in error  # no extra is left that needs the removed one
    for extra, command in COMMANDS.items():
        is_listed = re.search(rf"^\W*{command} ", output, re.M) is not None
        assert is_listed == (name not in (extra, ALL)), command
    for extra, flag in FLAGS.items():
        assert (f"  {flag} " in output) == (name not in (extra, ALL)), flag
