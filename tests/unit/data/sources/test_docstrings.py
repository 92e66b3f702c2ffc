"""`builtin:docstrings`: what a row holds, and that the splits share nothing."""

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
def test_there_are_enough_rows_with_just_the_two_columns(rows, kind):
    for split, least in zip(SPLITS, (600, 40, 40), strict=True):
        assert len(rows[kind, split]) >= least
        for row in rows[kind, split]:
            assert tuple(row) == COLUMNS[kind]
            assert all(text and text == text.strip() for text in row.values())
            assert sum(map(len, row.values())) <= MAX_ROW_CHARACTERS
            assert all(text.isascii() for text in row.values())


def test_a_prompt_is_python_that_lacks_its_docstring(rows):
    for row in rows["generation", "train"][:300] + rows["generation", "validation"]:
        assert row["prompt"].startswith(INSTRUCTION)
        (function,) = ast.parse(row["prompt"].removeprefix(INSTRUCTION)).body
        assert ast.get_docstring(function) is None
        assert row["completion"] not in row["prompt"]


def test_a_signature_is_that_of_the_header(rows):
    for row in rows["signatures", "train"][:300] + rows["signatures", "validation"]:
        header = row["prompt"].removeprefix(docstrings.SIGNATURE_INSTRUCTION).splitlines()[0]
        (function,) = ast.parse(f"{header} pass").body
        described = json.loads(row["completion"])
        assert described["name"] == function.name
        names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
        assert set(described["parameters"]) <= set(names) - {"self", "cls"}
        assert described["parameters"]


def test_a_summary_is_one_line_that_its_document_does_not_say(rows):
    for row in rows["summarization", "train"]:
        assert "\n" not in row["summary"]
        assert row["summary"].rstrip(".") not in row["document"]
        assert len(row["document"]) >= docstrings.MIN_DOCUMENT_CHARACTERS


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_target_and_repeat_none(rows, kind):
    targets = {split: [row[TARGET[kind]] for row in rows[kind, split]] for split in SPLITS}
    if kind == "generation":
        for found in targets.values():
            assert len(found) == len(set(found))
        for one, other in combinations(SPLITS, 2):
            assert not set(targets[one]) & set(targets[other])
    whole = {split: {tuple(row.values()) for row in rows[kind, split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not whole[one] & whole[other]


def test_splits_share_no_module_and_have_their_shares():
    modules = {split: {path for path, _ in stdlib_modules(split)} for split in SPLITS}
    everything = {path for path, _ in stdlib_modules()}
    assert set.union(*modules.values()) == everything
    assert sum(map(len, modules.values())) == len(everything)
    assert 0.80 < len(modules["train"]) / len(everything) < 0.92
    assert not any("test" in path.split("/") or "site-packages" in path for path in everything)


def test_split_depends_on_the_path_alone():
    # Constants: another machine and another Python must agree with them.
    assert split_of("argparse.py") == "train"
    assert split_of("ast.py") == "validation"
    assert split_of("functools.py") == "test"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_limit_gives_a_prefix(rows, kind, split):
    assert load_docstrings(kind, split, limit=25) == rows[kind, split][:25]
    assert load_docstrings(kind, split, limit=0) == []


def test_a_prefix_is_spread_over_modules():
    rows = load_docstrings("generation", "train", limit=400)
    texts = {path: file.read_text() for path, file in stdlib_modules("train")[:150]}
    first_lines = [row["completion"].splitlines()[0] for row in rows]
    homes = {
        next((path for path, text in texts.items() if line in text), "") for line in first_lines
    }
    assert len(homes) >= 25


def forget_what_was_read() -> None:
    docstrings._documented.cache_clear()
    docstrings._cached_rows.cache_clear()


def test_a_sample_parses_only_a_part_of_the_library(monkeypatch):
    forget_what_was_read()
    parsed = []

    def count(file):
        parsed.append(file)
        return read_module(file)

    monkeypatch.setattr(docstrings, "read_module", count)
    assert len(load_docstrings("generation", "train", limit=400)) == 400
    # Parsing is all of the time: 0.6 s for this on an idle server core, 1.7 s for everything.
    assert len(parsed) == len(set(parsed)) < len(stdlib_modules()) / 2


def test_only_statements_that_hold_no_others_are_passed_over():
    holding = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    blocks = ("handlers", "finalbody", "orelse", "body")
    for _, file in stdlib_modules("validation"):
        tree = ast.parse(file.read_bytes())
        plain, pending = [], [tree]
        while pending:
            node = pending.pop()
            plain += [node] if isinstance(node, holding) else []
            for block in blocks:
                pending.extend(reversed(getattr(node, block, ())))
        assert list(docstrings._scopes(tree)) == plain


def test_rows_that_were_read_before_are_the_same_and_nobody_elses():
    forget_what_was_read()
    few = load_docstrings("signatures", "test", limit=3)
    many = load_docstrings("signatures", "test", limit=9)
    few[0]["prompt"] = "changed"
    assert load_docstrings("signatures", "test", limit=9) == many
    forget_what_was_read()
    assert load_docstrings("signatures", "test", limit=9) == many


def test_a_reading_that_was_broken_off_is_begun_anew(monkeypatch):
    forget_what_was_read()
    whole = load_docstrings("generation", "test", limit=50)
    forget_what_was_read()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "_documented", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_docstrings("generation", "test", limit=50)
    assert load_docstrings("generation", "test", limit=50) == whole


def test_rows_do_not_depend_on_what_was_read_before():
    forget_what_was_read()
    alone = load_docstrings("summarization", "test", limit=20)
    forget_what_was_read()
    for split in SPLITS:
        after = load_docstrings("summarization", split, limit=20)
    assert after == alone
    assert split == "test"


def test_read_module_cuts_docstrings_out(tmp_path):
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
    found = [(item.kind, item.source, item.docstring) for item in read_module(file)]
    assert found == [
        ("module", "", "The module."),
        ("class", "", "A thing."),
        ("function", "@property\ndef size(self):\n    return 1", "Return\nthe size."),
        ("function", "", "Joined."),
        ("function", "", "Nothing but this."),
        ("function", "", "Stand in."),
    ]


def test_a_form_feed_does_not_shift_the_lines(tmp_path):
    file = tmp_path / "paged.py"
    file.write_text('x = 1\n\x0c\ndef f():\n    """Return 1."""\n    return 1\n')
    (item,) = read_module(file)
    assert item.source == "def f():\n    return 1"


@pytest.mark.parametrize("content", [b"def f(:\n", b"\xff\xfe", b"x = 1\x00"])
def test_a_file_that_cannot_be_parsed_is_passed_over(tmp_path, content):
    file = tmp_path / "bad.py"
    file.write_bytes(content)
    assert read_module(file) == []


def test_a_python_without_sources_is_an_input_error(monkeypatch, tmp_path):
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
def test_an_unknown_kind_or_split_names_the_known_ones(kind, split, text):
    with pytest.raises(InputError, match=text):
        load_docstrings(kind, split)


def test_reading_needs_no_heavy_import():
    code = (
        "import sys; from ftlevel.data.sources.docstrings import load_docstrings as read;"
        "read('generation', 'validation', 1);"
        "print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
