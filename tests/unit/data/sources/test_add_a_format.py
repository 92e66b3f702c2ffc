"""A format is added as docs/add-a-format.md says: a class, a line, and every door knows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ftlevel.cli.app import run
from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.files import READERS
from ftlevel.data.sources.readers.text_lines import TextLines
from ftlevel.data.sources.splits import load_splits
from ftlevel.data.sources.stream_sources import open_source
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs/add-a-format.md").read_text(encoding="utf-8")


class KeyValue(Reader):
    """`key=value;key=value`, a row a line."""

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"at": 0, "line": 0}
        text = TextLines(self.path, **at)
        taken, number = iter(text), int(at["line"])
        while some := list(islice(taken, PART)):
            rows: list[Row] = []
            lines: list[int] = []
            bad: list[BadRow] = []
            for number, line in enumerate(some, number + 1):  # noqa: B020
                pairs = [pair.split("=") for pair in line.strip().split(";")]
                if all(len(pair) == 2 for pair in pairs):
                    rows.append(dict(pairs))
                    lines.append(number)
                else:
                    bad.append(BadRow(number, "not key=value;key=value"))
            yield self.chunk(rows, lines, bad, text.cursor(number))


@pytest.fixture(autouse=True)
def _with_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, ".kv", KeyValue)
    monkeypatch.chdir(tmp_path)
    rows = [f"prompt=say {i};completion=it is {i}" for i in range(150)]
    Path("x.kv").write_text("\n".join(rows), encoding="utf-8")


def test_it_is_read_as_a_table() -> None:
    table = load_splits("x.kv").train
    assert len(table) == 150
    assert table.rows[149] == {"prompt": "say 149", "completion": "it is 149"}
    assert table.where(149) == "x.kv:150"
    Path("x.kv").write_text("prompt=a;completion=b\noops\nprompt=c\n" * 2, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_splits("x.kv")
    assert caught.value.problems[0] == "x.kv:2: not key=value;key=value."
    assert len(load_splits("x.kv", on_bad_row="skip").train) == 2


def test_it_is_one_of_the_files_of_a_directory() -> None:
    Path("d").mkdir()
    Path("x.kv").rename("d/train.kv")
    assert len(load_splits("d").train) == 150


def test_it_is_read_as_a_stream() -> None:
    source = open_source("x.kv", split=None, subset=None, on_bad_row="error", validation_rows=None)
    chunks = list(source.train.chunks())
    assert [len(chunk.rows) for chunk in chunks] == [64, 64, 22]
    later = source.train.chunks(json.loads(json.dumps(chunks[0].cursor)))
    assert [chunk.lines for chunk in later] == [chunk.lines for chunk in chunks[1:]]


@pytest.mark.parametrize("more", [[], ["--streaming", "--max-steps", "3"]])
def test_it_is_previewed(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["preview", "--dataset", "x.kv", *more]) == 0
    assert "x.kv:1" in capsys.readouterr().out


def test_a_name_that_nothing_reads_lists_it() -> None:
    Path("x.kw").write_text("a=b", encoding="utf-8")
    with pytest.raises(InputError, match=r"Formats: .*\.txt, \.kv\."):
        load_splits("x.kw")


def test_the_page_names_files_and_names_that_are_there() -> None:
    paths = re.findall(r"`((?:src|tests|docs)/[\w./-]+)`", PAGE)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for name in ("in_parts", "uniform", "unit", "read", "path"):
        assert f"`{name}`" in PAGE
        assert name in dir(KeyValue(Path("x.kv")))
