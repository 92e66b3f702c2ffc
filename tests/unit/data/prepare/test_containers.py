"""Equal rows are encoded equally from every dataset container."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from ftlevel.config import DataConfig, InMemoryDataset
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, ignore_progress
from ftlevel.data.prepare.inference import Prompts, in_memory_rows, open_rows
from ftlevel.data.sources.readers import ReadOptions
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS
from row_files import write_rows
from tiny_tokenizers import build_tokenizer

Rows = list[dict[str, Any]]
COUNT = 6


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ADD = tool("add", a={"type": "integer"}, b={"type": "integer"})
WEATHER = tool("weather", city={"type": "string", "enum": ["Rome", "Paris"]})
PING = {"name": "ping", "description": "no parameters"}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def messages(i: int) -> dict[str, Any]:
    """Return a conversation whose keys of turns, calls and tools differ from the next one's."""
    tools, calls = [
        ([ADD], [call("add", a=i, b=2)]),
        ([WEATHER, PING], [call("weather", city="Rome"), call("ping")]),
        ([PING, ADD, WEATHER], [call("ping")]),
    ][i % 3]
    turns: Rows = [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": f"done {i}"},
    ]
    return {"messages": turns if i % 2 else turns[:2], "tools": tools}


def preference(i: int) -> dict[str, Any]:
    pair = {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
    return {**pair, "score_chosen": 1.5, "score_rejected": 0.5}


def preference_turns(i: int) -> dict[str, Any]:
    good = [{"role": "assistant", "content": f"good {i}"}]
    bad = [{"role": "assistant", "tool_calls": [call("add", a=i) if i % 2 else call("ping")]}]
    question = [{"role": "user", "content": f"question {i}"}]
    return {"prompt": question, "chosen": good, "rejected": bad, "tools": [ADD if i % 2 else PING]}


def answers(i: int) -> dict[str, Any]:
    values = {"text": ["Rome"] if i % 3 else [], "answer_start": [3 + i] if i % 3 else []}
    return {"context": "in " + "a" * i + "Rome it is", "question": f"where {i}", "answers": values}


def spans(i: int) -> dict[str, Any]:
    values = [{"start": 0, "end": 3, "label": "LOC"}] if i % 2 else []
    if i % 3 == 1:  # not all spans have a note
        values = [{**span, "note": "sure"} for span in values]
    return {"text": f"Rom is {i}", "spans": values}


def tags(i: int) -> dict[str, Any]:
    return {"tokens": ["Rome", "is", str(i)], "tags": ["B-LOC", "O", "O"]}


def several_labels(i: int) -> dict[str, Any]:
    return {"text": f"a text {i}", "label": [n for k, n in enumerate("xyz") if (i + 1) >> k & 1]}


FORMATS: dict[str, tuple[str, str, str, Callable[[int], dict[str, Any]]]] = {
    "messages": ("text-generation", "decoder", "qwen2", messages),
    "preference": ("preference", "decoder", "qwen2", preference),
    "preference_turns": ("preference", "decoder", "qwen2", preference_turns),
    "answers": ("question-answering", "encoder", "bert", answers),
    "spans": ("token-classification", "encoder", "bert", spans),
    "tags": ("token-classification", "encoder", "bert", tags),
    "several_labels": ("text-classification", "encoder", "bert", several_labels),
}
"""Format name → (task, model kind, model family, function that creates a row)."""


def read_with_pandas(rows: Rows, folder: Path) -> pd.DataFrame:
    """Return a frame whose lists are arrays and whose integers next to nulls are floats."""
    return pd.read_parquet(write_rows(folder / "rows.parquet", rows))


def read_with_pandas_arrow_types(rows: Rows, folder: Path) -> pd.DataFrame:
    return pd.read_parquet(write_rows(folder / "rows.parquet", rows), dtype_backend="pyarrow")


def json_dataset(rows: Rows, _: Path) -> datasets.Dataset:
    """Return a dataset with the list type that `datasets` uses for mixed JSON objects."""
    kinds = datasets.Dataset.from_list(rows).features
    nested = {name: datasets.List(datasets.Json()) for name in kinds if is_turns(rows[0][name])}
    return datasets.Dataset.from_list(rows, features=datasets.Features({**kinds, **nested}))


def is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


FILES = ("jsonl", "json", "csv", "parquet", "arrow", "saved")
IN_MEMORY: dict[str, Callable[[Rows, Path], Any]] = {
    "list": lambda rows, _: rows,
    "generator": lambda rows, _: iter(rows),
    "arrow_table": lambda rows, _: pa.Table.from_pylist(rows),
    "dataset": lambda rows, _: datasets.Dataset.from_list(rows),
    "dataset_of_json": json_dataset,
    "iterable_dataset": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "frame": lambda rows, _: pd.DataFrame(rows),
    "frame_of_arrays": read_with_pandas,
    "frame_of_arrow": read_with_pandas_arrow_types,
}


def build(container: str, rows: Rows, folder: Path) -> Any:
    """Return a dataset of `rows` in a container of `FILES` or `IN_MEMORY`."""
    if container == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if container in FILES:
        return str(write_rows(folder / f"rows.{container}", rows))
    return InMemoryDataset(IN_MEMORY[container](rows, folder))


def prepare(dataset: Any, format_: str, **options: Any) -> PreparedData:
    task, kind, family, _ = FORMATS[format_]
    tokenizer = build_tokenizer(family)
    if kind == "decoder":
        set_chat_template(tokenizer, "qwen")
    context = EncodingContext(
        TASKS[task], kind, tokenizer, len(tokenizer), LengthBounds(5_000), seed=3
    )
    gate = dict.fromkeys(("exact_duplicates", "near_duplicates"), "ignore")
    config = DataConfig(dataset=dataset, gate=gate, **options)
    return prepare_data(config, context, ignore_progress)


def create_rows(format_: str, create_row: Callable[[int], dict[str, Any]] | None = None) -> Rows:
    return [*map(create_row or FORMATS[format_][-1], range(COUNT))]


def to_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return all fields of the encoded rows except `row`."""
    return [
        {field.name: getattr(row, field.name) for field in fields(row) if field.name != "row"}
        for row in rows
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the encoded rows from JSON Lines, which preserves all values."""
    folder = tmp_path_factory.mktemp("expected")
    return {
        name: to_dicts(prepare(build("jsonl", create_rows(name), folder), name).train)
        for name in FORMATS
    }


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("container", [*FILES, *IN_MEMORY])
def test_containers_give_equal_encoded_rows(container, format_, expected, tmp_path):
    dataset = build(container, create_rows(format_), tmp_path)
    assert to_dicts(prepare(dataset, format_).train) == expected[format_]


def with_null_default(i: int) -> dict[str, Any]:
    row = messages(i)
    units = {"type": "string", "default": None}
    return {**row, "tools": [tool("measure", units=units), *row["tools"]]}


def decode_rows(prepared: PreparedData) -> str:
    tokenizer = build_tokenizer("qwen2")
    return "".join(tokenizer.decode(row.input_ids) for row in prepared.train)


@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "list", "generator", "frame"])
def test_json_nulls_are_kept(container, tmp_path):
    rows = create_rows("messages", with_null_default)
    prepared = prepare(build(container, rows, tmp_path), "messages")
    assert decode_rows(prepared).count('"default": null') == COUNT
    assert not get_null_notes(prepared)
    assert '"city": null' not in decode_rows(prepared)


def test_nulls_of_arrow_json_column_are_kept(tmp_path):
    rows = create_rows("messages", with_null_default)
    features = datasets.Features({n: datasets.List(datasets.Json()) for n in rows[0]})
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    for dataset in (str(path), InMemoryDataset(datasets.Dataset.from_parquet(str(path)))):
        prepared = prepare(dataset, "messages")
        assert decode_rows(prepared).count('"default": null') == COUNT
        assert not get_null_notes(prepared)


@pytest.mark.parametrize(
    "container", ["parquet", "arrow", "saved", "arrow_table", "dataset", "frame_of_arrays"]
)
def test_arrow_nulls_are_dropped_and_counted(container, tmp_path):
    rows = create_rows("messages", with_null_default)
    prepared = prepare(build(container, rows, tmp_path), "messages")
    assert "null" not in decode_rows(prepared)
    [note] = get_null_notes(prepared)
    unified = pa.Table.from_pylist(rows).to_pylist()
    assert f"dropped {count_nulls(unified):,} null keys of objects in lists" in note
    assert "tools.function.parameters.properties" in note


def get_null_notes(prepared: PreparedData) -> list[str]:
    return [
        str(c.value) for c in prepared.choices if c.name == "note" and "null key" in str(c.value)
    ]


def count_nulls(value: Any) -> int:
    """Return the number of null keys that are not inside another null."""
    if isinstance(value, dict):
        return sum(item is None or count_nulls(item) for item in value.values())
    return sum(map(count_nulls, value)) if isinstance(value, list) else 0


def test_joined_files_keep_their_nulls(tmp_path):
    rows = create_rows("messages", with_null_default)
    files = [build(name, rows, tmp_path) for name in ("jsonl", "parquet", "csv")]
    prepared = prepare(files[0], "messages", also=files[1:])
    assert decode_rows(prepared).count('"default": null') == 2 * COUNT


def test_python_repr_in_csv_cell_raises(tmp_path):
    path = tmp_path / "x.csv"
    pd.DataFrame(create_rows("messages")).to_csv(path, index=False)
    with pytest.raises(InputError, match="'tools' is not valid JSON") as caught:
        prepare(str(path), "messages")
    assert "Write lists and objects as JSON" in str(caught.value)


def test_json_like_text_is_not_parsed(tmp_path):
    rows = [{**preference(i), "chosen": '[{"a": 1}]', "rejected": "[1"} for i in range(COUNT)]
    prepared = [prepare(build(name, rows, tmp_path), "preference") for name in ("csv", "jsonl")]
    assert to_dicts(prepared[0].train) == to_dicts(prepared[1].train)


@pytest.mark.parametrize("format_", ["messages", "preference_turns"])
@pytest.mark.parametrize("container", ["csv", "json", "parquet"])
def test_containers_give_equal_rows_to_predict(container, format_, tmp_path):
    rows = create_rows(format_)
    paths = [build(name, rows, tmp_path) for name in ("jsonl", container)]
    sources = [open_rows(path, ReadOptions())[0] for path in paths]
    shape = TASKS["text-generation"].get_query_format(sources[0].leading, {})
    expected, questions = ([row.question for row in Prompts(s, shape)] for s in sources)
    assert questions == expected


@pytest.mark.parametrize("container", IN_MEMORY)
def test_in_memory_rows_are_equal_in_every_container(container, tmp_path):
    rows = create_rows("messages")
    dataset = IN_MEMORY[container](rows, tmp_path)
    assert [row for row, *_ in in_memory_rows(dataset).read()] == rows


def test_in_memory_rows_reject_dataset_dict_and_no_rows():
    rows = datasets.DatasetDict(test=datasets.Dataset.from_list(create_rows("tags")))
    with pytest.raises(InputError, match=r"a dict of 'test'.*rows\['test'\]"):
        in_memory_rows(rows)
    with pytest.raises(InputError, match="there are 0 rows to predict"):
        in_memory_rows(pd.DataFrame({"text": []}))


def test_leaked_test_row_is_reported_with_its_line(tmp_path):
    rows = [{"prompt": f"question {i} of all", "completion": f"answer {i}"} for i in range(20)]
    write_rows(tmp_path / "train.jsonl", rows)
    unusable = {"prompt": "another", "completion": None}
    unrelated = {"prompt": "something else entirely", "completion": "yes"}
    write_rows(tmp_path / "test.jsonl", [unusable, unrelated, rows[3]])
    leaks = [f for f in prepare(str(tmp_path), "messages").findings if f.name == "leaked"]
    assert [(f.split, f.count, f.places) for f in leaks] == [
        ("test", 1, (f"{tmp_path / 'test.jsonl'}:3",))
    ]


def test_unusable_validation_rows_are_counted(tmp_path):
    rows = create_rows("messages")
    held_out = tmp_path / "held_out.jsonl"
    unusable = [{**rows[0], "messages": "none"}, {**rows[0], "messages": []}]
    write_rows(held_out, [*rows, *unusable])
    train = build("jsonl", rows, tmp_path)
    prepared = prepare(train, "messages", validation_file=held_out, on_bad_row="skip")
    changed = [choice.value for choice in prepared.choices if choice.name == "rows changed"]
    assert changed == ["2 of validation dropped, unusable"]
