"""Adding an export format: a module and one line, tested with `names`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import EXPORT, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return EXPORT.apply(tmp_path_factory.mktemp("tree"))


def test_adding_an_export_format_takes_one_file_and_one_line() -> None:
    assert len(EXPORT.touched) <= 2


def test_added_format_is_exported(package_dir: Path, tmp_path: Path) -> None:
    command = ["export", "builtin:tiny-llama", "--format", "names", "--out", "tiny.names"]
    summary = json.loads(run(package_dir, *command, "--json", cwd=tmp_path))
    lines = (tmp_path / "tiny.names").read_text().splitlines()
    assert len(lines) == summary["tensors"] > 10
    assert lines[0].startswith("model.embed_tokens.weight (")


def test_wrong_suffix_for_added_format_is_rejected(package_dir: Path, tmp_path: Path) -> None:
    command = ["export", "builtin:tiny-llama", "--format", "names", "--out", "tiny.gguf"]
    assert "tiny.gguf does not end in .names" in run(package_dir, *command, cwd=tmp_path, code=2)
