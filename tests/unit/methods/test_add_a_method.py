"""Tests that the example in docs/add-a-method.md works: two files and their registration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from additions.tree import METHOD, PAGE, run
from ftlevel.config import SPECS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with the example method of the page."""
    assert len(METHOD.touched) <= 3
    return METHOD.apply(tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="module")
def ftlevel(package_dir: Path) -> Callable[..., Any]:
    """Return a function that runs the command line of the copy and parses its JSON output."""
    return lambda *arguments: json.loads(run(package_dir, *arguments, "--json", cwd=package_dir))


def test_page_names_only_existing_files():
    paths = set(re.findall(r"`((?:src|tests|scripts|docs)/[\w/.]+)`", PAGE)) - {
        f"src/ftlevel/{path}" for path in METHOD.files
    }
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []


def test_source_has_no_isinstance_checks_of_method_specs():
    class_names = {spec.__name__ for spec in SPECS.values()}
    pattern = re.compile(rf"isinstance\([^)]*\b(?:{'|'.join(class_names)})\b")
    sources = (ROOT / "src").rglob("*.py")
    assert [path for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_example_method_is_listed_and_rejects_unknown_field(ftlevel, package_dir):
    rows = {row["name"]: row for row in ftlevel("list-methods", "--model", "gpt2")["methods"]}
    assert (rows["scale"]["works"], rows["ia3"]["works"]) == ("in part", "yes")
    arguments = ("train", "--method", "scale", "--set", "method.r=4")
    error = run(package_dir, *arguments, cwd=package_dir, code=2)
    assert error.startswith("ftlevel: --set method.r: 'method.r' belongs to method lora, ")


@pytest.mark.slow
def test_example_method_trains_and_merges(ftlevel):
    summary = ftlevel("train", "--method", "scale", "--max-steps", "2", "--max-samples", "16",
                      "--output-dir", "run")  # fmt: skip
    choices = {choice["name"]: choice for choice in summary["choices"]}
    assert summary["method"] == "scale"
    expected = "default for scale on a decoder of hidden size 192 and 2 steps; "
    assert choices["learning rate"]["reason"].startswith(expected)
    assert summary["trainable_parameters"] > 0
    assert summary["proof"]["adapter_effect"] > 0
    assert ftlevel("merge", "run", "--out", "merged")
