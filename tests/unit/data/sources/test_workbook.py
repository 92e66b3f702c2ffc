"""Excel workbooks: cells are read as values, with their row numbers."""

from __future__ import annotations

import sys
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest

from ftlevel.data.sources.readers import ReadOptions, load_table, open_reader
from ftlevel.errors import InputError

openpyxl = pytest.importorskip("openpyxl")


def write_workbook(
    path: Path, *rows: list[Any], sheet: str = "Data", second_sheet: str | None = None
) -> Path:
    book = openpyxl.Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    if second_sheet is not None:
        book.create_sheet(second_sheet).append(["note"])
        book[second_sheet].append(["of the second sheet"])
    book.save(path)
    return path


VALUES = [
    (5, "General", "5"), (0.1 + 0.2, "General", "0.3"), (1234.5, "#,##0.00", "1234.5"),
    (0.256, "0%", "0.256"), (7.0, "0.0", "7"), (True, "General", "TRUE"), ("NA", "General", "NA"),
    (date(2024, 5, 1), "dd.mm.yyyy", "2024-05-01"),
    (datetime(2024, 5, 1, 9, 30), "yyyy-mm-dd h:mm", "2024-05-01 09:30:00"),
    (time(9, 5), "h:mm", "09:05:00"), ("00123", "@", "00123"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "number_format", "text"), VALUES)
def test_cell_is_read_as_its_value(value, number_format, text, tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["text"])
    book.active.append([value])
    book.active["A2"].number_format = number_format
    book.save(tmp_path / "x.xlsx")
    assert load_table(tmp_path / "x.xlsx").rows == [{"text": text}]


def test_rows_have_sheet_row_numbers(tmp_path):
    rows = [[], ["text", "when"], ["a\nb", date(2024, 5, 1)], [], ["c", None]]
    table = load_table(write_workbook(tmp_path / "x.xlsx", *rows))
    assert table.rows == [{"text": "a\nb", "when": "2024-05-01"}, {"text": "c", "when": ""}]
    assert table.lines == [3, 5]
    assert table.where(1) == f"{tmp_path}/x.xlsx row 5"


def test_sheet_is_first_or_selected_by_subset(tmp_path):
    path = write_workbook(tmp_path / "x.xlsx", ["text"], ["a"], second_sheet="Other")
    table = load_table(path)
    assert table.rows == [{"text": "a"}]
    assert "sheet 'Data', the first of Data, Other; --subset another" in table.notes[0]
    assert load_table(path, options=ReadOptions(subset="Other")).rows == [
        {"note": "of the second sheet"}
    ]
    with pytest.raises(InputError, match=r"--subset Othr: .* Did you mean 'Other'\? Sheets: Data"):
        load_table(path, options=ReadOptions(subset="Othr"))


def test_invalid_workbooks_raise(tmp_path):
    path = write_workbook(
        tmp_path / "x.xlsx", ["text", "n"], ["a", 1], ["b", "#N/A"], ["c", 1, "more"]
    )
    with pytest.raises(InputError) as error:
        load_table(path)
    assert error.value.problems[:2] == [
        f"{path} row 3: column 2 is an error, such as #N/A.",
        f"{path} row 4: has 3 cells, but the header has 2.",
    ]
    duplicate_header = write_workbook(tmp_path / "y.xlsx", ["text", "text"], ["a", "b"])
    with pytest.raises(InputError, match=r"y\.xlsx row 1: the header has 'text' twice"):
        open_reader(duplicate_header)
    empty = write_workbook(tmp_path / "z.xlsx")
    with pytest.raises(InputError, match="has 0 rows"):
        load_table(empty)
    (tmp_path / "no.xlsx").write_bytes(b"\xd0\xcf\x11\xe0 an encrypted workbook")
    with pytest.raises(InputError, match=r"not a readable \.xlsx file .*password"):
        open_reader(tmp_path / "no.xlsx")


def test_missing_openpyxl_error_names_extra(tmp_path, monkeypatch):
    path = write_workbook(tmp_path / "x.xlsx", ["text"], ["a"])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match=r"needs openpyxl.* pip install 'ftlevel\[xlsx\]'"):
        open_reader(path)
