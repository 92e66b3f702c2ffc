"""Generated parts of pages and CSV files replace what they generated before, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import page_parts


@pytest.fixture(autouse=True)
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page_parts, "DOCS", tmp_path)
    return tmp_path


def test_only_named_part_of_page_is_replaced(docs):
    part = "<!--generated:{}-->\n\n{}\n\n<!--/generated-->\n"
    text = "# Title\n\n" + part.format("a", "old\nlines") + "\nBetween.\n\n" + part.format("b", "x")
    (docs / "page.md").write_text(text)
    assert page_parts.fill("page", {"a": "new"}) == text.replace("old\nlines", "new")
    assert page_parts.fill("page", {"a": "old\nlines", "b": "x"}) == text
    with pytest.raises(ValueError, match="has no <!--generated:c-->"):
        page_parts.fill("page", {"c": ""})


def test_csv_rows_with_same_keys_are_replaced_in_place(docs):
    (docs / "table.csv").write_text("name,form,value\na,x,1\nb,x,2\na,y,3\n")
    rows = [{"name": "c", "form": "x", "value": "5"}, {"name": "a", "form": "x", "value": "4"}]
    page_parts.update_csv("table.csv", rows, ("name", "form"))
    expected = "name,form,value\na,x,4\nb,x,2\na,y,3\nc,x,5\n"
    assert (docs / "table.csv").read_text() == expected
