"""Adding a format as in docs/add-a-format.md: one class and one line are enough everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from additions.key_value import KeyValue
from additions.tree import DATA_FORMAT
from additions.tree import run as run_in
from ftlevel.cli.app import run
from ftlevel.data.sources.readers import READERS
from ftlevel.data.sources.splits import load_splits
from ftlevel.errors import InputError

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs/add-a-format.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _registered_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, ".kv", KeyValue)
    monkeypatch.chdir(tmp_path)
    rows = [f"prompt=say {i};completion=it is {i}" for i in range(150)]
    Path("x.kv").write_text("\n".join(rows), encoding="utf-8")


def test_added_format_is_read_as_table():
    table = load_splits("x.kv").train
    assert len(table) == 150
    assert table.rows[149] == {"prompt": "say 149", "completion": "it is 149"}
    assert table.where(149) == "x.kv:150"
    Path("x.kv").write_text("prompt=a;completion=b\noops\nprompt=c\n" * 2, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_splits("x.kv")
    assert error.value.problems[0] == "x.kv:2: not key=value;key=value."
    assert len(load_splits("x.kv", on_bad_row="skip").train) == 2


def test_added_format_is_read_from_directory():
    Path("d").mkdir()
    Path("x.kv").rename("d/train.kv")
    assert len(load_splits("d").train) == 150


def test_added_format_is_previewed(capsys):
    assert run(["preview", "--dataset", "x.kv"]) == 0
    assert "x.kv:1" in capsys.readouterr().out


def test_unknown_format_error_lists_added_format():
    Path("x.kw").write_text("a=b", encoding="utf-8")
    with pytest.raises(InputError, match=r"Formats: .*\.txt, .*\.kv\."):
        load_splits("x.kw")


def test_page_refers_to_existing_files_and_attributes():
    paths = re.findall(r"`((?:src|tests|docs)/[\w./-]+)`", PAGE)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for name in ("uniform", "unit", "read", "path"):
        assert f"`{name}`" in PAGE
        assert name in dir(KeyValue(Path("x.kv")))


@pytest.mark.slow
def test_adding_a_format_touches_two_files(tmp_path):
    assert len(DATA_FORMAT.touched) <= 2
    tree = DATA_FORMAT.apply(tmp_path / "tree")
    assert "x.kv:1" in run_in(tree, "preview", "--dataset", "x.kv", cwd=tmp_path)
