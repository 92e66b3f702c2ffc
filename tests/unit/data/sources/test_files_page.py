"""docs/data.md lists all file formats, and --input-format accepts their suffixes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftlevel.data.sources.lines import PACKED
from ftlevel.data.sources.readers import READERS, ReadOptions, load_table
from ftlevel.errors import InputError

PAGE = (Path(__file__).parents[4] / "docs/data.md").read_text(encoding="utf-8")


def test_table_of_formats_matches_readers():
    section = PAGE.split("### Files\n")[1].split("\n## ")[0]
    documented = {
        suffix
        for endings in re.findall(r"^\| (`\.[^|]+) \|", section, re.M)
        for suffix in re.findall(r"`(\.\w+)`", endings)
    }
    assert documented == set(READERS)
    assert all(f"`{suffix}`" in section for suffix in PACKED)


def test_input_format_accepts_suffixes(tmp_path):
    path = tmp_path / "rows.log"
    path.write_text('{"text": "a"}\n')
    assert list(load_table(path, options=ReadOptions("jsonl")).rows) == [{"text": "a"}]
    with pytest.raises(
        InputError, match=r"--input-format jsnl: .* Did you mean 'jsonl'\? Formats:"
    ):
        load_table(path, options=ReadOptions("jsnl"))
