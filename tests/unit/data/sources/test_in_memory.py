"""Rows in memory become tables as files do, and no message shows one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from ftlevel.config import InMemoryDataset, TrainConfig
from ftlevel.data.sources.splits import DatasetSplits, load_splits, open_source
from ftlevel.errors import ConfigError, InputError

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def load(rows: Any, **settings: Any) -> DatasetSplits:
    return load_splits(InMemoryDataset(rows), **settings)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        pd.DataFrame(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        datasets.Dataset.from_list(ROWS).data.table,
        {"train": ROWS},
    ],
    ids=["list", "tuple", "frame", "dataset", "iterable", "arrow", "splits"],
)
def test_all_kinds_give_the_same_rows(rows: Any) -> None:
    found = load(rows)
    assert list(found.train.rows) == ROWS
    assert found.name == "in memory"
    assert found.validation is None


def test_a_frame_gives_plain_values_and_none_for_what_is_missing() -> None:
    frame = pd.DataFrame(
        {
            "text": ["a", None, "c"],
            "kind": pd.Categorical(["x", "y", "x"]),
            "count": pd.array([1, None, 3], dtype="Int64"),
            "share": [0.5, np.nan, 1.0],
            "words": [np.array(["p", "q"]), np.array(["r"]), np.array(["s"])],
            7: [1, 2, 3],
        },
        index=[10, 20, 30],
    )
    first, second, _ = load(frame).train.rows
    assert first == {"text": "a", "kind": "x", "count": 1, "share": 0.5, "words": ["p", "q"],
                     "7": 1}  # fmt: skip
    assert second["text"] is second["count"] is second["share"] is None
    assert [type(first[name]) for name in ("count", "share", "7")] == [int, float, int]


def test_splits_and_names_of_classes_are_read() -> None:
    data = datasets.Dataset.from_list(ROWS)
    data = data.cast_column("label", datasets.ClassLabel(names=["n", "p"]))
    found = load(datasets.DatasetDict(train=data, validation=data, test=data))
    assert found.train.label_names == {"label": ("n", "p")}
    assert found.validation is not None
    assert found.validation.where(1) == "dataset (validation) row 2"
    assert list(load(datasets.DatasetDict(a=data, b=data), split="b").train.rows) == ROWS


def test_a_generator_is_gone_through_once_and_kept() -> None:
    rows = InMemoryDataset(row for row in ROWS)
    assert list(load_splits(rows).train.rows) == list(load_splits(rows).train.rows) == ROWS


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "dataset: has 0 rows"),
        (pd.DataFrame({"text": []}), "dataset: has 0 rows"),
        ([{"text": "SECRET"}, "SECRET"], "dataset row 2 is of type str. Expected a dict"),
        ({"text": ["SECRET"], "label": ["SECRET"]}, "are a dict of columns"),
        ([{"text": "SECRET"}, {"text": "b"}, {"txt": "SECRET"}], "dataset row 3: lacks 'text'"),
        (pd.DataFrame([["SECRET", "b"]], columns=["a", "a"]), "has the column 'a' twice"),
    ],
    ids=["none", "no-rows", "text", "columns", "odd", "twice"],
)
def test_what_cannot_be_used_is_named_and_not_shown(rows: Any, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        load(rows)
    assert complaint in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_odd_rows_can_be_left_out() -> None:
    assert len(load([*ROWS, {"other": 1}], on_bad_row="skip").train) == 2


def test_the_name_alone_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in memory").write_text('{"text": "a"}\n')  # which is not what the name means
    with pytest.raises(InputError, match="were handed over in Python, and are not kept"):
        load_splits("in memory")
    with pytest.raises(InputError, match=r"is in memory already\. Drop --streaming"):
        open_source(InMemoryDataset(ROWS))


def test_a_configuration_shows_the_name_alone() -> None:
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
    "wrong",
    [
        {"output": {"resume": True}},
        {"data": {"dataset": pd.DataFrame({"text": ["SECRET"]}), "max_length": -1}},
        {"dat": pd.DataFrame({"text": ["SECRET"]})},
        {"data": {"datset": pd.DataFrame({"text": ["SECRET"]})}},
    ],
)
def test_no_error_shows_a_row(wrong: dict[str, Any]) -> None:
    values = {"data": {"dataset": pd.DataFrame({"text": ["SECRET"]})}, **wrong}
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert "SECRET" not in str(caught.value) + repr(caught.value)


def test_a_section_may_be_given_as_an_object() -> None:
    from ftlevel.config.methods import SPECS

    config = TrainConfig(method=SPECS["ia3"]()).with_sections(task="masked-lm")
    assert (config.method.kind, config.task) == ("ia3", "masked-lm")


def test_a_mapping_without_splits_is_refused() -> None:
    with pytest.raises(InputError, match="has no splits"):
        load_splits(InMemoryDataset({}))
