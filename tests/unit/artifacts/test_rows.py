"""Row files: other readers can read them, and interrupted ones can be resumed."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftlevel.artifacts.row_files import (
    ROW_FILES,
    ParquetFile,
    check_row_file,
    row_file_type,
    save_rows,
)
from ftlevel.artifacts.row_sinks import RowColumns, RowFile, partial_of
from ftlevel.errors import ConfigError, InputError

ROWS = [
    {"id": "1", "text": 'a "quoted", text\nof two lines', "note": ""},
    {"id": "02", "text": "ünïcödé 🦊\r\nand\rreturns", "note": "  x  "},
    {"id": "3", "text": "plain", "note": "\t"},
    {"id": "4", "text": "", "note": "#"},
]
ANSWERS = {"prediction": "text", "prediction_score": "number"}
FULL = [{**row, "prediction": f"ä{i}", "prediction_score": i / 3} for i, row in enumerate(ROWS)]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def create_file(path: Path, names: list[str] | None = None) -> RowFile:
    columns = RowColumns(names or list(ROWS[0]), ANSWERS)
    return row_file_type("--output", path)(path, columns)


def read(path: Path) -> list[dict[str, Any]]:
    """Read `path` with csv, json or pyarrow."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    return [{**row, "prediction_score": float(row["prediction_score"])} for row in rows]


def write(path: Path, rows: list[dict[str, Any]], keep: int = 0) -> RowFile:
    file = create_file(path)
    file.open(keep)
    for row in rows:
        file.write([row])
    return file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_rows_are_read_back_and_extended(suffix, tmp_path):
    path = tmp_path / "deep" / f"p{suffix}"
    file = write(path, FULL[:2])
    assert not path.exists()
    file.finalize()
    assert read(path) == FULL[:2]
    file = create_file(path)
    assert len(list(file.load_previous())) == 2
    file.open(2)
    file.write(FULL[2:])
    file.finalize()
    assert read(path) == FULL
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_file_is_resumed_at_any_size(suffix, tmp_path):
    complete = tmp_path / f"whole{suffix}"
    write(complete, FULL).close()
    content = partial_of(complete).read_bytes()
    for size in [*range(0, len(content), 7 if suffix != ".parquet" else 97), len(content)]:
        path = tmp_path / f"p{suffix}"
        partial_of(path).write_bytes(content[:size])
        file = create_file(path)
        previous = list(file.load_previous())
        assert previous == [file.normalize(row) for row in ROWS[: len(previous)]]
        file.open(len(previous))
        for row in FULL[len(previous) :]:
            file.write([row])
        file.finalize()
        assert read(path) == FULL, size
        path.unlink()
    assert len(previous) == len(ROWS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_column_raises_on_resume(suffix, tmp_path):
    path = tmp_path / f"p{suffix}"
    save_rows(path, [{"id": "1", "prediction": "x"}])
    with pytest.raises(InputError, match="prediction_score"):
        list(create_file(path).load_previous())


def test_json_values_are_written_as_text_in_csv(tmp_path):
    row = {"whole": 3, "part": 0.1, "yes": True, "none": None, "list": ["ä", 1], "of": {"a": []},
           "day": datetime.date(2026, 1, 2), "sum": decimal.Decimal("1.10")}  # fmt: skip
    save_rows(tmp_path / "p.csv", [row])
    _, cells = list(csv.reader((tmp_path / "p.csv").open(encoding="utf-8")))
    assert cells == ["3", "0.1", "true", "", '["ä", 1]', '{"a": []}', "2026-01-02", "1.10"]
    save_rows(tmp_path / "p.jsonl", [{**row, "part": float("nan")}])
    assert json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))["part"] is None


def test_parquet_types_are_preserved(tmp_path):
    table = pa.table({
        "small": pa.array([1, None], pa.int8()),
        "half": pa.array([0.5, float("nan")], pa.float32()),
        "when": pa.array([1, 2], pa.timestamp("us", "UTC")),
        "cost": pa.array([decimal.Decimal("1.10")] * 2, pa.decimal128(9, 2)),
        "parts": pa.array([[{"a": 1}], []], pa.list_(pa.struct([("a", pa.int16())]))),
        "raw": pa.array([b"\xff", b""]),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
    })  # fmt: skip
    path = tmp_path / "p.parquet"
    columns = RowColumns(table.schema.names, {"prediction": "texts"}, table.schema)
    file = row_file_type("--output", path)(path, columns)
    file.open(0)
    file.write([{**row, "prediction": ["ä"]} for row in table.to_pylist()])
    file.finalize()
    written = pq.read_table(path)
    assert written.schema.names == [*table.schema.names, "prediction"]
    for name in table.schema.names:
        assert written[name].type == table[name].type, name
        assert repr(written[name].to_pylist()) == repr(table[name].to_pylist()), name
    assert written["prediction"].to_pylist() == [["ä"], ["ä"]]


def test_parquet_rejects_mixed_types(tmp_path):
    file = create_file(tmp_path / "p.parquet", ["x"])
    file.open(0)
    file.write([{"x": 1}])
    with pytest.raises(InputError, match=r"values of one column differ in type .* Write .jsonl"):
        file.write([{"x": "one"}])
    file.close()


def test_existing_row_file_is_not_overwritten(tmp_path):
    def check(name="p.csv", *, resume=False, overwrite=False):
        check_row_file("--output", tmp_path / name, resume=resume, overwrite=overwrite)

    with pytest.raises(ConfigError, match=r"cannot write '.xlsx'. Formats: .csv, .tsv, .jsonl"):
        check("p.xlsx")
    check()
    partial_of(tmp_path / "p.csv").write_text("x")
    message = r"has rows of an interrupted command\. Resume it with --resume, or delete it\."
    with pytest.raises(ConfigError, match=message):
        check()
    check(resume=True)
    (tmp_path / "p.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"p\.csv exists"):
        check()
    check(overwrite=True)


def test_resumed_parquet_matches_row_without_null_keys(tmp_path):
    row = {"talk": [{"role": "user", "tags": None}], "facts": {"a": 1}}
    kinds = pa.struct([("role", pa.string()), ("tags", pa.list_(pa.string()))])
    schema = pa.schema([("talk", pa.list_(kinds)), ("facts", pa.map_(pa.string(), pa.int64()))])
    columns = RowColumns(["talk", "facts"], {"answer": "text"}, schema)
    first = ParquetFile(tmp_path / "x.parquet", columns)
    first.open(0)
    first.write([{**row, "answer": "yes"}])
    first.close()
    resumed = ParquetFile(tmp_path / "x.parquet", columns)
    [previous] = resumed.load_previous()
    assert previous == resumed.normalize({**row, "talk": [{"role": "user"}]})
    assert previous != resumed.normalize({**row, "talk": [{"role": "user", "tags": ["a"]}]})
    assert previous != resumed.normalize({**row, "talk": [{"role": "tool"}]})


VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
EMBEDDED = RowColumns(["text"], {"vector": "embedding"})


def embedded_rows(numbers):
    return [{"text": f"t{n}", "vector": VECTORS[n]} for n in numbers]


def test_embeddings_in_every_file_format(tmp_path):
    for name in ("a.npy", "a.parquet", "a.jsonl", "a.csv"):
        file = ROW_FILES[f".{name[2:]}"](tmp_path / name, EMBEDDED)
        file.open(0)
        file.write(embedded_rows([0, 1]))
        file.write([{"text": "none", "vector": None}, *embedded_rows([3])])
        file.finalize()
    array = np.load(tmp_path / "a.npy")
    assert (array.dtype, array.shape) == (np.float32, (4, 3))
    assert np.array_equal(array[[0, 1, 3]], VECTORS[[0, 1, 3]])
    assert np.isnan(array[2]).all()
    table = pq.read_table(tmp_path / "a.parquet")
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<element: float>[3]")
    assert table["vector"].to_pylist()[3] == VECTORS[3].tolist()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[2]["vector"] is None
    assert np.array_equal(np.array(lines[1]["vector"], dtype=np.float32), VECTORS[1])
    cells = (tmp_path / "a.csv").read_text().splitlines()
    assert cells[1].startswith('t0,"[0.0, 0.142857149, 0.285714298]"')


def interrupt(path, numbers):
    file = ROW_FILES[path.suffix](path, EMBEDDED)
    file.open(0)
    file.write(embedded_rows(numbers))
    file.close()  # as after a kill
    return ROW_FILES[path.suffix](path, EMBEDDED)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_embeddings_are_resumed(tmp_path, suffix):
    path, rows = tmp_path / f"a{suffix}", embedded_rows(range(4))
    file = interrupt(path, [0, 1, 2])
    assert list(file.load_previous()) == [file.normalize(row) for row in rows[:3]]
    file.open(3)
    file.write(rows[3:])
    file.finalize()
    is_npy = suffix == ".npy"
    vectors = np.load(path) if is_npy else pq.read_table(path)["vector"].to_pylist()
    assert np.array_equal(np.array(vectors, dtype=np.float32), VECTORS)


def test_conll_file_has_a_word_and_its_tags_per_line(tmp_path):
    path = tmp_path / "a.conll"
    tags = {"true": ["O", "B-LOC"], "predicted": ["O", None]}
    save_rows(path, [{"tokens": ["in", "Rome"], **tags}, {"tokens": ["a", "b"], **tags}])
    assert path.read_text() == "in O O\nRome B-LOC O\n\na O O\nb B-LOC O\n\n"
    with pytest.raises(InputError, match=r"\.conll files hold words with tags"):
        save_rows(tmp_path / "b.conll", [{"text": "a", "predicted": "b"}])


def test_npy_rejects_other_columns(tmp_path):
    with pytest.raises(ConfigError, match=r"\.npy files hold embeddings only"):
        ROW_FILES[".npy"](tmp_path / "a.npy", RowColumns(["text"], {"label": "text"}))


def test_embeddings_of_other_width_are_not_appended(tmp_path):
    file = interrupt(tmp_path / "a.npy", [0, 1])
    file.open(len(list(file.load_previous())))
    with pytest.raises(InputError, match="has embeddings of 3 dimensions, and these have 2"):
        file.write([{"text": "t2", "vector": VECTORS[2][:2]}])


def test_npy_without_embeddings_is_resumed(tmp_path):
    for _ in range(2):
        file = ROW_FILES[".npy"](tmp_path / "a.npy", EMBEDDED)
        assert list(file.load_previous()) == []
        file.open(0)
        file.write([{"text": "none", "vector": None}])
        file.finalize()


def test_numpy_scalars_are_numbers(tmp_path):
    row = {"count": np.int64(3), "share": np.float32(0.5), "flag": np.bool_(True)}
    save_rows(tmp_path / "a.jsonl", [row])
    assert (tmp_path / "a.jsonl").read_text() == '{"count": 3, "share": 0.5, "flag": true}\n'
    save_rows(tmp_path / "a.csv", [row])
    assert (tmp_path / "a.csv").read_text() == "count,share,flag\n3,0.5,true\n"
