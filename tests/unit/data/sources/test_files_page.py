"""docs/data.md names the formats that are read, and the flag takes their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from ftlevel.config.sections import InputFormat
from ftlevel.data.sources.packed import PACKED
from ftlevel.data.sources.readers.files import READERS

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


def test_the_flag_takes_each_format_once() -> None:
    named = [READERS[f".{name}"] for name in get_args(InputFormat)]
    assert len(named) == len(set(named))
    assert set(named) == set(READERS.values())
