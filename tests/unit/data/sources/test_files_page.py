"""docs/data.md names the formats that are read, and the flag takes their endings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftlevel.data.sources.lines import PACKED
from ftlevel.data.sources.readers import READERS, ReadOptions, load_table
from ftlevel.errors import InputError

PAGE = (Path(__file__).parents[4] / "docs/data.md").read_text(encoding="utf-8")


def test_the_table_of_files_is_that_of_the_readers() -> None:
    section = PAGE.split("### Files\n")[1].split("\n## ")[0]
    told = {
        suffix: streams == "yes"
        for endings, streams in re.findall(r"^\| (`\.[^|]+) \|.*\| (yes|no) \|$", section, re.M)
        for suffix in re.findall(r"`(\.\w+)`", endings)
    }
    assert told == {suffix: reader.in_parts for suffix, reader in READERS.items()}
    assert all(f"`{suffix}`" in section for suffix in PACKED)


def test_the_flag_takes_the_endings(tmp_path: Path) -> None:
    path = tmp_path / "rows.log"
    path.write_text('{"text": "a"}\n')
    assert list(load_table(path, options=ReadOptions("jsonl")).rows) == [{"text": "a"}]
    with pytest.raises(
        InputError, match=r"--input-format jsnl: .* Did you mean 'jsonl'\? Formats:"
    ):
        load_table(path, options=ReadOptions("jsnl"))
