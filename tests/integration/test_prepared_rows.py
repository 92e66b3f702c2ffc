"""Prepared rows in files equal those in memory, for one and two processes, and are cached."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
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

ModelDir = Callable[..., Path]
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
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset, "SMALL_BYTES", 0)
    monkeypatch.setattr(dataset, "MIN_CACHED_ROWS", 100)
    for batches in (encoder, encode, store):  # so that these few rows are several of each
        name = "BATCH" if batches is encoder else "_BATCH"
        monkeypatch.setattr(batches, name, 50)


def plan_of(model: Path, data: Path, task: str = "text-generation", **options: Any) -> Any:
    return resolve(
        TrainConfig.model_validate(
            {
                "task": task,
                "model": {"name_or_path": str(model), "device": "cpu"},
                "data": {"dataset": str(data), **options},
            }
        )
    )


def write_talk(path: Path, count: int = ROWS) -> Path:
    lines = (json.dumps({"prompt": f"the value {i}", "completion": f"it is {i} {i * i}"})
             for i in range(count))  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def folders() -> list[str]:
    root = dataset.cache_root()
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.exists() else []


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(a == b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_rows_in_a_file_are_those_of_a_list(
    name: str, tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, family, head, options = TASKS[name]
    data = task_data.write(tmp_path / "data", name, rows=ROWS)
    model = tiny_model_dir(family, head)
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    first = plan_of(model, data, task, **options).data
    again = plan_of(model, data, task, **options).data
    assert len(folders()) == 1
    monkeypatch.setattr(dataset, "MIN_CACHED_ROWS", 10**9)
    monkeypatch.setattr(lines, "LARGE_BYTES", 10**9)
    plain = plan_of(model, data, task, cache=False, **options).data
    assert isinstance(getattr(plain.train, "rows", plain.train), list)
    for kept in (first, again):
        assert isinstance(getattr(kept.train, "rows", kept.train), RowStore)
        assert same(kept.train, plain.train)
        assert same(kept.validation, plain.validation)
        assert kept.info == json.loads(json.dumps(plain.info))
        assert kept.findings == plain.findings
        assert kept.prompt_format == plain.prompt_format
        assert kept.table.where(3) == plain.table.where(3)


def test_two_processes_give_the_rows_of_one(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    data, model = write_talk(tmp_path / "x.jsonl", 175), tiny_model_dir("qwen2")
    one = plan_of(model, data, cache=False).data
    two = plan_of(model, data, cache=False, num_proc=2).data
    assert isinstance(two.train, RowStore)
    assert same(one.train, two.train)
    assert folders() == []


def test_an_error_in_another_process_names_its_row(
    tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    data = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns} for _ in range(125)]
    rows[110] = {"messages": turns * 2}
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.jsonl:111: is a conversation of 4 messages"):
        plan_of(tiny_model_dir("llama", chat=False), data, num_proc=2)
    assert folders() == []


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({}, False),
        ({"num_proc": 2}, False),
        ({"max_length": 60}, True),
        ({"gate": {"near_duplicates": "ignore"}}, True),
        ({"chat_template": "chatml"}, True),
    ],
)
def test_what_changes_the_rows_changes_the_key(
    change: dict[str, Any], anew: bool, tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    data, model = write_talk(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")
    plan_of(model, data)
    plan = plan_of(model, data, **change)
    assert len(folders()) == 1 + anew
    [said] = [c.value for c in plan.choices if c.name == "rows"]
    assert said == ("kept for the next run" if anew else "prepared before")


def test_one_changed_byte_is_seen(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    data, model = write_talk(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")
    before = plan_of(model, data).data
    stat = data.stat()
    data.write_text(data.read_text().replace('value 7"', 'value 8"'), encoding="utf-8")
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = plan_of(model, data).data
    assert len(folders()) == 2
    assert [i for i in range(ROWS) if before.train[i] != after.train[i]] == [7]


def test_a_preparation_that_was_killed_leaves_nothing_that_is_used(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_talk(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            plan_of(model, data)
    assert folders() == []
    assert len(plan_of(model, data).data.train) == ROWS


def test_a_preview_reads_what_is_kept(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    config = TrainConfig.model_validate(
        {
            "model": {"name_or_path": str(tiny_model_dir("qwen2"))},
            "data": {"dataset": str(write_talk(tmp_path / "x.jsonl"))},
        }
    )
    first, again = preview(config, [5]), preview(config, [5])
    assert (first.rows, first.lengths, first.data_info) == (
        again.rows,
        again.lengths,
        again.data_info,
    )
    assert first.rows[0].location == again.rows[0].location == f"{tmp_path / 'x.jsonl'}:5"


def test_a_preview_keeps_the_splits_apart(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    (tmp_path / "set").mkdir()
    write_talk(tmp_path / "set/train.jsonl")
    rows = [{"prompt": f"held {i}", "completion": f"out {i * i}"} for i in range(ROWS)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "set/validation.jsonl").write_text(text, encoding="utf-8")
    config = TrainConfig.model_validate(
        {"model": {"name_or_path": str(tiny_model_dir("llama")), "device": "cpu"},
         "data": {"dataset": str(tmp_path / "set")}}
    )  # fmt: skip
    for _ in range(2):  # prepared, and found again
        [row] = preview(config, [3]).rows
        assert "the value 2" in "".join(token.text for token in row.tokens)


def test_a_store_behaves_like_a_list(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    rows = list(plan_of(tiny_model_dir("qwen2"), write_talk(tmp_path / "x.jsonl")).data.train)
    stored = write_store(tmp_path / "rows.arrow", rows_to_batches(rows))
    assert stored[-1] == rows[-1]
    assert stored[3:9:2] == rows[3:9:2]
    with pytest.raises(IndexError):
        stored[ROWS]
    some = select_rows(select_rows(stored, np.arange(5, 110)), np.array([0, 90]))
    assert [row.row for row in some] == [5, 95]
    doubled = map_rows(stored, lambda row: [row, row] if row.row == 2 else [row])
    assert [row.row for row in doubled[:5]] == [0, 1, 2, 2, 3]
    assert len(map_rows(stored, lambda row: [])) == 0


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plan = plan_of(tiny_model_dir("llama"), write_talk(tmp_path / "rows.jsonl"))
    assert len(plan.data.train) == ROWS
    said = [f"{c.value} ({c.reason})" for c in plan.data.choices if c.name == "rows"]
    root = tmp_path / "file/ftlevel/rows"
    assert said == [f"not cached ({root} cannot be written)"]


@pytest.mark.parametrize("how", ["one bit", "half", "emptied", "deleted"])
@pytest.mark.parametrize("name", ["train.arrow", "lines.npy", "prepared.json", "manifest.json"])
def test_rows_that_were_damaged_are_prepared_anew(
    tmp_path: Path, tiny_model_dir: ModelDir, name: str, how: str
) -> None:
    data, model = write_talk(tmp_path / "x.jsonl"), tiny_model_dir("qwen2")
    whole = list(plan_of(model, data).data.train)
    (path,) = dataset.cache_root().rglob(name)
    content = path.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"one bit": flipped, "half": content[:half], "emptied": b""}[how])
    plan = plan_of(model, data)
    assert list(plan.data.train) == whole
    assert "the cache was damaged" in str(plan.choices)
    assert "the cache was damaged" not in str(plan_of(model, data).choices)
