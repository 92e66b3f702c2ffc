"""docs/add-a-method.md is true: what it shows is a method, in two files and its registration."""

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package that has the page's method."""
    assert len(METHOD.touched) <= 3
    return METHOD.apply(tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="module")
def ftlevel(folder: Path) -> Callable[..., Any]:
    """Return its command line."""
    return lambda *arguments: json.loads(run(folder, *arguments, "--json", cwd=folder))


def test_the_page_names_files_that_there_are() -> None:
    named = set(re.findall(r"`((?:src|tests|scripts|docs)/[\w/.]+)`", PAGE)) - {
        f"src/ftlevel/{path}" for path in METHOD.files
    }
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_nobody_asks_which_method_it_has() -> None:
    names = {spec.__name__ for spec in SPECS.values()}
    asks = re.compile(rf"isinstance\([^)]*\b(?:{'|'.join(names)})\b")
    sources = (ROOT / "src").rglob("*.py")
    assert [path for path in sources if asks.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_the_method_of_the_page_is_listed_and_refused(
    ftlevel: Callable[..., Any], folder: Path
) -> None:
    rows = {row["name"]: row for row in ftlevel("list-methods", "--model", "gpt2")["methods"]}
    assert (rows["scale"]["works"], rows["ia3"]["works"]) == ("in part", "yes")
    refused = ("train", "--method", "scale", "--set", "method.r=4")
    error = run(folder, *refused, cwd=folder, code=2)
    assert error.startswith("ftlevel: --set method.r: 'method.r' belongs to method lora, ")


@pytest.mark.slow
def test_the_method_of_the_page_trains_and_merges(ftlevel: Callable[..., Any]) -> None:
    summary = ftlevel("train", "--method", "scale", "--max-steps", "2", "--max-samples", "16",
                      "--output-dir", "run")  # fmt: skip
    shown = {choice["name"]: choice for choice in summary["choices"]}
    assert summary["method"] == "scale"
    default = "default for scale on a decoder of hidden size 192 and 2 steps; "
    assert shown["learning rate"]["reason"].startswith(default)
    assert summary["trainable_parameters"] > 0
    assert summary["proof"]["adapter_effect"] > 0
    assert ftlevel("merge", "run", "--out", "merged")
