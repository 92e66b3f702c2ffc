"""`builtin:docstrings`: contents of rows, and disjoint splits."""

import ast
import json
import subprocess
import sys
from itertools import combinations
from typing import get_args

import pytest

from ftlevel.data.sources.docstrings import Kind, Split, load_docstrings, load_documentation
from ftlevel.errors import InputError

INSTRUCTION = "Explain this Python function.\n\n"
SIGNATURE_INSTRUCTION = "Describe this Python function as JSON.\n\n"
MAX_ROW_CHARACTERS, MIN_DOCUMENT_CHARACTERS = 1200, 100
KINDS, SPLITS = get_args(Kind), get_args(Split)
TARGET = {"signatures": "completion", "generation": "completion", "summarization": "summary"}
COLUMNS = {
    "signatures": ("prompt", "completion"),
    "generation": ("prompt", "completion"),
    "summarization": ("document", "summary"),
}


@pytest.fixture(scope="module")
def rows():
    return {(kind, split): load_docstrings(kind, split) for kind in KINDS for split in SPLITS}


@pytest.mark.parametrize("kind", KINDS)
def test_row_count_and_columns_of_each_split(rows, kind):
    for split, min_rows in zip(SPLITS, (600, 40, 40), strict=True):
        assert len(rows[kind, split]) >= min_rows
        for row in rows[kind, split]:
            assert tuple(row) == COLUMNS[kind]
            assert all(text and text == text.strip() for text in row.values())
            assert sum(map(len, row.values())) <= MAX_ROW_CHARACTERS
            assert all(text.isascii() for text in row.values())


def test_generation_prompt_is_function_without_docstring(rows):
    for row in rows["generation", "train"][:300] + rows["generation", "validation"]:
        assert row["prompt"].startswith(INSTRUCTION)
        (function,) = ast.parse(row["prompt"].removeprefix(INSTRUCTION)).body
        assert ast.get_docstring(function) is None
        assert row["completion"] not in row["prompt"]


def test_signature_target_matches_function_header(rows):
    for row in rows["signatures", "train"][:300] + rows["signatures", "validation"]:
        header = row["prompt"].removeprefix(SIGNATURE_INSTRUCTION).splitlines()[0]
        (function,) = ast.parse(f"{header} pass").body
        signature = json.loads(row["completion"])
        assert signature["name"] == function.name
        names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
        assert set(signature["parameters"]) <= set(names) - {"self", "cls"}
        assert signature["parameters"]


def test_summary_is_one_line_and_not_in_document(rows):
    for row in rows["summarization", "train"]:
        assert "\n" not in row["summary"]
        assert row["summary"].rstrip(".") not in row["document"]
        assert len(row["document"]) >= MIN_DOCUMENT_CHARACTERS


@pytest.mark.parametrize("kind", KINDS)
def test_splits_have_disjoint_rows_and_unique_targets(rows, kind):
    targets = {split: [row[TARGET[kind]] for row in rows[kind, split]] for split in SPLITS}
    if kind == "generation":
        for split_targets in targets.values():
            assert len(split_targets) == len(set(split_targets))
        for first, second in combinations(SPLITS, 2):
            assert not set(targets[first]) & set(targets[second])
    split_rows = {split: {tuple(row.values()) for row in rows[kind, split]} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not split_rows[first] & split_rows[second]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_limit_returns_first_rows(rows, kind, split):
    assert load_docstrings(kind, split, limit=25) == rows[kind, split][:25]
    assert load_docstrings(kind, split, limit=0) == []


def test_unknown_kind_or_split_raises():
    message = r"unknown kind 'generate'\. Available: signatures, generation, summarization"
    with pytest.raises(InputError, match=message):
        load_docstrings("generate", "train")
    message = r"unknown split 'dev'\. Available: train, validation, test"
    with pytest.raises(InputError, match=message):
        load_docstrings("generation", "dev")


def test_loading_imports_no_heavy_library():
    code = (
        "import sys; from ftlevel.data.sources.docstrings import load_docstrings as read;"
        "read('generation', 'validation', 1);"
        "print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


def test_documentation_is_not_in_training_rows(rows):
    texts = load_documentation()
    assert sum(map(len, texts)) > 50_000
    assert not {row["completion"] for row in rows["generation", "train"]} & set(texts)
