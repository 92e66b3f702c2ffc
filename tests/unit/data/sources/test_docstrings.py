"""`builtin:docstrings`: contents of rows, and disjoint splits."""

import ast
import json
import subprocess
import sys
import textwrap
from itertools import combinations
from typing import get_args

import pytest

from ftlevel.data.sources import docstrings
from ftlevel.data.sources.docstrings import (
    INSTRUCTION,
    MAX_ROW_CHARACTERS,
    Kind,
    Split,
    load_docstrings,
    read_module,
    split_of,
    stdlib_modules,
    stdlib_root,
)
from ftlevel.errors import InputError

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
        header = row["prompt"].removeprefix(docstrings.SIGNATURE_INSTRUCTION).splitlines()[0]
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
        assert len(row["document"]) >= docstrings.MIN_DOCUMENT_CHARACTERS


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


def test_splits_have_disjoint_modules_and_expected_sizes():
    modules = {split: {path for path, _ in stdlib_modules(split)} for split in SPLITS}
    all_modules = {path for path, _ in stdlib_modules()}
    assert set.union(*modules.values()) == all_modules
    assert sum(map(len, modules.values())) == len(all_modules)
    assert 0.80 < len(modules["train"]) / len(all_modules) < 0.92
    assert not any("test" in path.split("/") or "site-packages" in path for path in all_modules)


def test_split_depends_only_on_path():
    # Constants, which must be equal on every machine and Python version.
    assert split_of("argparse.py") == "train"
    assert split_of("ast.py") == "validation"
    assert split_of("functools.py") == "test"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_limit_returns_first_rows(rows, kind, split):
    assert load_docstrings(kind, split, limit=25) == rows[kind, split][:25]
    assert load_docstrings(kind, split, limit=0) == []


def test_first_rows_come_from_many_modules():
    rows = load_docstrings("generation", "train", limit=400)
    texts = {path: file.read_text() for path, file in stdlib_modules("train")[:150]}
    first_lines = [row["completion"].splitlines()[0] for row in rows]
    source_modules = {
        next((path for path, text in texts.items() if line in text), "") for line in first_lines
    }
    assert len(source_modules) >= 25


def clear_caches() -> None:
    docstrings._documented.cache_clear()
    docstrings._cached_rows.cache_clear()


def test_limited_load_parses_few_modules(monkeypatch):
    clear_caches()
    parsed = []

    def counting_read(file):
        parsed.append(file)
        return read_module(file)

    monkeypatch.setattr(docstrings, "read_module", counting_read)
    assert len(load_docstrings("generation", "train", limit=400)) == 400
    # Parsing dominates the time: 0.6 s for this on an idle server core, 1.7 s for all modules.
    assert len(parsed) == len(set(parsed)) < len(stdlib_modules()) / 2


def test_scopes_visit_every_nested_definition():
    scope_types = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    blocks = ("handlers", "finalbody", "orelse", "body")
    for _, file in stdlib_modules("validation"):
        tree = ast.parse(file.read_bytes())
        expected, pending = [], [tree]
        while pending:
            node = pending.pop()
            expected += [node] if isinstance(node, scope_types) else []
            for block in blocks:
                pending.extend(reversed(getattr(node, block, ())))
        assert list(docstrings._scopes(tree)) == expected


def test_cached_rows_are_not_modified_by_callers():
    clear_caches()
    first_rows = load_docstrings("signatures", "test", limit=3)
    more_rows = load_docstrings("signatures", "test", limit=9)
    first_rows[0]["prompt"] = "changed"
    assert load_docstrings("signatures", "test", limit=9) == more_rows
    clear_caches()
    assert load_docstrings("signatures", "test", limit=9) == more_rows


def test_load_succeeds_after_interrupted_load(monkeypatch):
    clear_caches()
    expected = load_docstrings("generation", "test", limit=50)
    clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "_documented", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_docstrings("generation", "test", limit=50)
    assert load_docstrings("generation", "test", limit=50) == expected


def test_rows_do_not_depend_on_earlier_loads():
    clear_caches()
    expected = load_docstrings("summarization", "test", limit=20)
    clear_caches()
    for split in SPLITS:
        actual = load_docstrings("summarization", split, limit=20)
    assert actual == expected
    assert split == "test"


def test_read_module_separates_docstrings(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        textwrap.dedent(
            '''\
            """The module."""
            try:
                class Thing:
                    """A thing."""

                    @property
                    def size(self):
                        """Return
                        the size."""

                        return 1

                    def one_line(self): "Joined."; return 2

                    def bare(self):
                        """Nothing but this."""
            except Exception:
                def fallback():
                    """Stand in."""
                    return """
            left of the function
                    """
            '''
        )
    )
    items = [(item.kind, item.source, item.docstring) for item in read_module(file)]
    assert items == [
        ("module", "", "The module."),
        ("class", "", "A thing."),
        ("function", "@property\ndef size(self):\n    return 1", "Return\nthe size."),
        ("function", "", "Joined."),
        ("function", "", "Nothing but this."),
        ("function", "", "Stand in."),
    ]


def test_form_feed_does_not_shift_lines(tmp_path):
    file = tmp_path / "paged.py"
    file.write_text('x = 1\n\x0c\ndef f():\n    """Return 1."""\n    return 1\n')
    (item,) = read_module(file)
    assert item.source == "def f():\n    return 1"


@pytest.mark.parametrize("content", [b"def f(:\n", b"\xff\xfe", b"x = 1\x00"])
def test_unparsable_file_is_skipped(tmp_path, content):
    file = tmp_path / "bad.py"
    file.write_bytes(content)
    assert read_module(file) == []


def test_python_without_sources_raises(monkeypatch, tmp_path):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"has none .* --dataset"):
        stdlib_root()


@pytest.mark.parametrize(
    ("kind", "split", "text"),
    [
        (
            "generate",
            "train",
            r"unknown kind 'generate'. Available: signatures, generation, summarization",
        ),
        ("generation", "dev", r"unknown split 'dev'. Available: train, validation, test"),
    ],
)
def test_unknown_kind_or_split_raises(kind, split, text):
    with pytest.raises(InputError, match=text):
        load_docstrings(kind, split)


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
