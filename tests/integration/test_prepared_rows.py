"""Prepared rows in files equal those in memory, for one and two processes, and are cached."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import task_data
from ftlevel.commands.preview import preview
from ftlevel.config import TrainConfig
from ftlevel.data.encoding import encode, store
from ftlevel.data.encoding.store import (
    RowStore,
    map_rows,
    rows_to_batches,
    select_rows,
    write_store,
)
from ftlevel.data.prepare import dataset, encoder
from ftlevel.data.sources import lines
from ftlevel.errors import InputError
from ftlevel.training.plan.resolve import resolve
from run_files import ModelDir

ROWS = 120
TASKS = {
    "tags": ("token-classification", "bert", "mlm", {}),
    "span": ("question-answering", "bert", "mlm", {"max_length": 48, "doc_stride": 12}),
    "mask": ("masked-lm", "bert", "mlm", {}),
    "class": ("text-classification", "bert", "mlm", {}),
    "multi": ("text-classification", "bert", "mlm", {}),
    "regression": ("text-classification", "gpt2", None, {}),
    "pair": ("translation", "t5", None, {"columns": {"source": "en", "target": "de"}}),
}


@pytest.fixture(autouse=True)
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_cache(tmp_path / "cache", monkeypatch)


def use_small_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(dataset, "SMALL_BYTES", 0)
    monkeypatch.setattr(dataset, "MIN_CACHED_ROWS", 100)
    for batches in (encoder, encode, store):  # several batches for few rows
        name = "BATCH" if batches is encoder else "_BATCH"
        monkeypatch.setattr(batches, name, 50)


def create_plan(model: Path, data: Path, task: str = "text-generation", **options: Any) -> Any:
    return resolve(
        TrainConfig.model_validate(
            {
                "task": task,
                "model": {"name_or_path": str(model), "device": "cpu"},
                "data": {"dataset": str(data), **options},
            }
        )
    )


def write_rows(path: Path, count: int = ROWS) -> Path:
    lines = (json.dumps({"prompt": f"the value {i}", "completion": f"it is {i} {i * i}"})
             for i in range(count))  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def cached_dirs() -> list[str]:
    root = dataset.cache_root()
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.exists() else []


def are_equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(a == b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_rows_in_store_equal_rows_in_memory(
    name: str, tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, family, head, options = TASKS[name]
    data = task_data.write(tmp_path / "data", name, rows=ROWS)
    model = tiny_model_dir(family, head)
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    first = create_plan(model, data, task, **options).data
    reloaded = create_plan(model, data, task, **options).data
    assert len(cached_dirs()) == 1
    monkeypatch.setattr(dataset, "MIN_CACHED_ROWS", 10**9)
    monkeypatch.setattr(lines, "LARGE_BYTES", 10**9)
    in_memory = create_plan(model, data, task, cache=False, **options).data
    assert isinstance(getattr(in_memory.train, "rows", in_memory.train), list)
    for stored in (first, reloaded):
        assert isinstance(getattr(stored.train, "rows", stored.train), RowStore)
        assert are_equal(stored.train, in_memory.train)
        assert are_equal(stored.validation, in_memory.validation)
        assert stored.info == json.loads(json.dumps(in_memory.info))
        assert stored.findings == in_memory.findings
        assert stored.prompt_format == in_memory.prompt_format
        assert stored.table.where(3) == in_memory.table.where(3)


def test_two_processes_prepare_same_rows_as_one(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    data, model = write_rows(tmp_path / "x.jsonl", 175), tiny_model_dir("qwen2")
    one_process = create_plan(model, data, cache=False).data
    two_processes = create_plan(model, data, cache=False, num_proc=2).data
    assert isinstance(two_processes.train, RowStore)
    assert are_equal(one_process.train, two_processes.train)
    assert cached_dirs() == []


def test_error_in_worker_process_reports_row(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    data = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns} for _ in range(125)]
    rows[110] = {"messages": turns * 2}
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.jsonl:111: is a conversation of 4 messages"):
        create_plan(tiny_model_dir("llama", chat=False), data, num_proc=2)
    assert cached_dirs() == []


@pytest.mark.parametrize(
    ("override", "is_prepared_again"),
    [
        ({}, False),
        ({"num_proc": 2}, False),
        ({"max_length": 60}, True),
        ({"gate": {"near_duplicates": "ignore"}}, True),
        ({"chat_template": "chatml"}, True),
    ],
)
def test_cache_key_depends_on_settings_that_change_rows(
    override: dict[str, Any], is_prepared_again: bool, tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    data, model = write_rows(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")
    create_plan(model, data)
    plan = create_plan(model, data, **override)
    assert len(cached_dirs()) == 1 + is_prepared_again
    [messages] = [c.value for c in plan.choices if c.name == "rows"]
    assert messages == ("kept for the next run" if is_prepared_again else "prepared before")


def test_changed_byte_in_dataset_invalidates_cache(
    tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    data, model = write_rows(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")
    before = create_plan(model, data).data
    stat = data.stat()
    data.write_text(data.read_text().replace('value 7"', 'value 8"'), encoding="utf-8")
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = create_plan(model, data).data
    assert len(cached_dirs()) == 2
    assert [i for i in range(ROWS) if before.train[i] != after.train[i]] == [7]


def test_interrupted_preparation_is_not_cached(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_rows(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            create_plan(model, data)
    assert cached_dirs() == []
    assert len(create_plan(model, data).data.train) == ROWS


def test_preview_shows_training_split_from_cache(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set/train.jsonl")
    rows = [{"prompt": f"held {i}", "completion": f"out {i * i}"} for i in range(ROWS)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "set/validation.jsonl").write_text(text, encoding="utf-8")
    config = TrainConfig.model_validate(
        {"model": {"name_or_path": str(tiny_model_dir("llama")), "device": "cpu"},
         "data": {"dataset": str(tmp_path / "set")}}
    )  # fmt: skip
    first, second = preview(config, [3]), preview(config, [3])  # prepared, then cached
    assert (first.rows, first.lengths) == (second.rows, second.lengths)
    assert first.data_info == second.data_info
    (row,) = first.rows
    assert row.location == f"{tmp_path / 'set/train.jsonl'}:3"
    assert "the value 2" in "".join(token.text for token in row.tokens)


def test_row_store_supports_list_operations(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    rows = list(create_plan(tiny_model_dir("qwen2"), write_rows(tmp_path / "x.jsonl")).data.train)
    stored = write_store(tmp_path / "rows.arrow", rows_to_batches(rows))
    assert stored[-1] == rows[-1]
    assert stored[3:9:2] == rows[3:9:2]
    with pytest.raises(IndexError):
        stored[ROWS]
    selected = select_rows(select_rows(stored, np.arange(5, 110)), np.array([0, 90]))
    assert [row.row for row in selected] == [5, 95]
    doubled = map_rows(stored, lambda row: [row, row] if row.row == 2 else [row])
    assert [row.row for row in doubled[:5]] == [0, 1, 2, 2, 3]
    assert len(map_rows(stored, lambda row: [])) == 0


def test_unwritable_cache_is_reported_and_ignored(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plan = create_plan(tiny_model_dir("llama"), write_rows(tmp_path / "rows.jsonl"))
    assert len(plan.data.train) == ROWS
    messages = [f"{c.value} ({c.reason})" for c in plan.data.choices if c.name == "rows"]
    root = tmp_path / "file/ftlevel/rows"
    assert messages == [f"not cached ({root} cannot be written)"]


@pytest.fixture(scope="module")
def cached_rows(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: ModelDir
) -> tuple[Path, list[Any]]:
    """Return a folder with a data set, x.jsonl, and its cache, and the prepared rows."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        use_small_cache(folder / "cache", patch)
        data = create_plan(tiny_model_dir("qwen2"), write_rows(folder / "x.jsonl")).data
        return folder, list(data.train)


@pytest.mark.parametrize("damage", ["one bit", "half", "emptied", "deleted"])
@pytest.mark.parametrize("name", ["train.arrow", "lines.npy", "prepared.json", "manifest.json"])
def test_damaged_cache_is_prepared_again(
    tmp_path: Path,
    tiny_model_dir: ModelDir,
    cached_rows: tuple[Path, list[Any]],
    name: str,
    damage: str,
) -> None:
    folder, expected = cached_rows
    data, model = folder / "x.jsonl", tiny_model_dir("qwen2")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (path,) = dataset.cache_root().rglob(name)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"one bit": flipped, "half": content[:middle], "emptied": b""}[damage])
    plan = create_plan(model, data)
    assert list(plan.data.train) == expected
    assert "the cache was damaged" in str(plan.choices)
    assert "the cache was damaged" not in str(create_plan(model, data).choices)
