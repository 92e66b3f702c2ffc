"""Rows in memory become tables as files do; messages never contain row contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from ftlevel.config import DataConfig, InMemoryDataset, TrainConfig
from ftlevel.data.prepare.loading import load_data
from ftlevel.data.sources.splits import DatasetSplits, load_splits
from ftlevel.errors import ConfigError, InputError
from ftlevel.tasks import TASKS

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def load(rows: Any, **settings: Any) -> DatasetSplits:
    return load_splits(InMemoryDataset(rows), **settings)


def test_data_frame_values_are_python_values_with_none():
    columns = {
        "text": ["a", None],
        "kind": pd.Categorical(["x", "y"]),
        "count": pd.array([1, None], dtype="Int64"),
        "share": [0.5, np.nan],
        "words": [np.array(["p", "q"]), np.array(["r"])],
        7: [1, 2],
    }
    first, second = load(pd.DataFrame(columns, index=[10, 20])).train.rows
    assert first == {"text": "a", "kind": "x", "count": 1, "share": 0.5, "words": ["p", "q"],
                     "7": 1}  # fmt: skip
    assert second["text"] is second["count"] is second["share"] is None
    assert [type(first[name]) for name in ("count", "share", "7")] == [int, float, int]


def test_dataset_dict_splits_and_label_names():
    data = datasets.Dataset.from_list(ROWS)
    data = data.cast_column("label", datasets.ClassLabel(names=["n", "p"]))
    splits = load(datasets.DatasetDict(train=data, validation=data, test=data))
    assert splits.train.label_names == {"label": ("n", "p")}
    assert splits.validation.where(1) == "dataset (validation) row 2"
    assert list(load(datasets.DatasetDict(a=data, b=data), split="b").train.rows) == ROWS


def test_generator_is_consumed_once_and_cached():
    rows = InMemoryDataset(row for row in ROWS)
    assert list(load_splits(rows).train.rows) == list(load_splits(rows).train.rows) == ROWS
    splits = load({"train": ROWS})
    assert (list(splits.train.rows), splits.name, splits.validation) == (ROWS, "in memory", None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "dataset: has 0 rows"),
        (pd.DataFrame({"text": []}), "dataset: has 0 rows"),
        ([{"text": "SECRET"}, "SECRET"], "dataset row 2 is of type str. Expected a dict"),
        ({"text": ["SECRET"], "label": ["SECRET"]}, "are a dict of columns"),
        ([{"text": "SECRET"}, {"text": "b"}, {"txt": "SECRET"}], "dataset row 3: lacks 'text'"),
        (pd.DataFrame([["SECRET", "b"]], columns=["a", "a"]), "has the column 'a' twice"),
    ],
    ids=["none", "no-rows", "text", "columns", "inconsistent", "duplicate"],
)
def test_invalid_rows_raise_without_showing_values(rows, message):
    with pytest.raises(InputError) as error:
        load(rows)
    assert message in str(error.value)
    assert "SECRET" not in str(error.value)


def test_name_in_memory_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in memory").write_text('{"text": "a"}\n')  # a file of that name is not used
    with pytest.raises(InputError, match="were passed in Python and are not saved"):
        load_splits("in memory")


def test_configuration_shows_only_dataset_name():
    frame = pd.DataFrame({"text": ["SECRET"]})
    config = TrainConfig(data={"dataset": frame}, method="ia3", quant="4bit", model=Path("x"))
    assert (config.method.kind, config.quant.kind) == ("ia3", "4bit")
    assert config.model.name_or_path == "x"
    assert config.data.dataset.rows is frame
    assert TrainConfig(data=frame).data.dataset.rows is frame
    assert "SECRET" not in repr(config)
    assert config.model_dump(mode="json")["data"]["dataset"] == "in memory"
    assert type(config.model_dump(mode="json")["data"]["dataset"]) is str


@pytest.mark.parametrize(
    "arguments",
    [
        {"output": {"resume": True}},
        {"data": {"dataset": pd.DataFrame({"text": ["SECRET"]}), "max_length": -1}},
        {"dat": pd.DataFrame({"text": ["SECRET"]})},
        {"data": {"datset": pd.DataFrame({"text": ["SECRET"]})}},
    ],
)
def test_configuration_errors_show_no_row(arguments):
    values = {"data": {"dataset": pd.DataFrame({"text": ["SECRET"]})}, **arguments}
    with pytest.raises(ConfigError) as error:
        TrainConfig(**values)
    assert "SECRET" not in str(error.value) + repr(error.value)


def test_section_can_be_an_object():
    from ftlevel.config.methods import SPECS

    config = TrainConfig(method=SPECS["ia3"]()).with_sections(task="masked-lm")
    assert (config.method.kind, config.task) == ("ia3", "masked-lm")


def test_mapping_without_splits_raises():
    with pytest.raises(InputError, match="has no splits"):
        load_splits(InMemoryDataset({}))


def test_lone_surrogates_are_bad_rows():
    rows = [{"prompt": "a", "completion": text} for text in ("b", "c\ud83d", "\U0001f600")]
    config = DataConfig(dataset=InMemoryDataset(rows))
    with pytest.raises(InputError, match=r"row 2: 'completion' has half of a surrogate pair"):
        load_data(config, TASKS["text-generation"], 0)
    config = config.model_copy(update={"on_bad_row": "skip"})
    assert len(load_data(config, TASKS["text-generation"], 0).train) == 2
