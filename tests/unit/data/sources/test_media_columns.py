"""Image, audio and video columns are rejected by name or value and can be ignored."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ftlevel.config import DataConfig, InMemoryDataset
from ftlevel.data.prepare.loading import load_data
from ftlevel.data.sources.splits import load_splits
from ftlevel.data.sources.streams import refuse_media_columns
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS
from row_files import write_rows

PNG = b"\x89PNG\r\n"
STRUCT = {"bytes": PNG, "path": "a.png"}

MEDIA = [
    ("image", "a.png", "images"),
    ("image", "000000391895", "images"),
    ("IMAGE_PATH", "coco/391895", "images"),
    ("images", ["a.png", "b.png"], "images"),
    ("pixel_values", [[0.1, 0.2], [0.3, 0.4]], "images"),
    ("photo", PNG, "images"),
    ("picture", "data:image/png;base64,iVBORw0", "images"),
    ("scan", "https://example.org/x/a.JPEG?size=big#top", "images"),
    ("file_name", "train/a.webp", "images"),
    ("raw", PNG, "images"),
    ("struct", STRUCT, "images"),
    ("blob", {"bytes": b"\0\1", "path": None}, "files"),
    ("audio", {"array": [0.0, 0.1], "sampling_rate": 16_000}, "audio"),
    ("clip", "cv/clip_1.mp3", "audio"),
    ("speech", [0.0, 0.1], "audio"),
    ("videos", [{"path": "a.mp4"}], "videos"),
]
TEXT = [
    ("source", "paper.pdf"),
    ("file_path", "src/app.py"),
    ("url", "https://example.org/page"),
    ("image", "a small cat on a red chair"),
    ("image", None),
    ("images", []),
    ("video", True),
    ("photos", 3),
    ("image_id", 391895),
    ("video_id", "dQw4w9WgXcQ"),
    ("digest", b"\0\1\2"),
    ("imagery", "sensual"),
    ("label", "cat"),
]


@pytest.mark.parametrize(("column", "value", "kind"), MEDIA)
def test_media_columns_are_detected_by_name_or_value(column, value, kind):
    rows = [{"text": "a cat", column: None}] * 70 + [{"text": "a cat", column: value}]
    if kind == "files" or column in ("scan", "file_name", "raw", "struct", "clip"):
        rows = rows[-2:]  # values are checked in the first rows only
    with pytest.raises(InputError) as error:
        refuse_media_columns([column], rows, "rows.jsonl")
    assert str(error.value) == (
        f"rows.jsonl: column {column!r} holds {kind}, and ftlevel trains on text only. To leave "
        f"it out and use the other columns: --ignore-columns {column}."
    )


@pytest.mark.parametrize(("column", "value"), TEXT)
def test_unused_text_columns_are_accepted(column, value):
    rows = [{column: value}]
    refuse_media_columns([column], rows, "rows.jsonl")
    assert rows == [{column: value}]
    with pytest.raises(InputError, match="column 'image' holds images"):
        refuse_media_columns([column, "image"], [{**rows[0], "image": "a.png"}], "rows.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("image", ["a.png", STRUCT, [STRUCT]], ids=["name", "struct", "list"])
def test_ignored_column_is_not_read(kind, image, tmp_path):
    rows = [{"image": image, "text": f"cat {i}"} for i in range(3)]
    name = str(write_rows(tmp_path / f"rows.{kind}", rows))
    task = TASKS["text-generation"]
    with pytest.raises(InputError, match=r"column 'image' holds images.*--ignore-columns image\."):
        load_data(DataConfig(dataset=name), task, 0)
    data = DataConfig(dataset=name, ignore_columns=("image",))
    loaded = load_data(data, task, 0)
    assert [example.text for example in loaded.train] == ["cat 0", "cat 1", "cat 2"]
    assert loaded.format.description == "text: 'text'"
    if kind != "jsonl":
        assert list(loaded.splits.train.rows[0]) == ["text"]
    misspelled = DataConfig(dataset=name, ignore_columns=("image", "imag"))
    with pytest.raises(InputError, match="--ignore-columns imag: no such column"):
        load_data(misspelled, task, 0)


def test_media_features_raise_in_memory_and_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"photo": datasets.Image(decode=False), "sound": datasets.Audio(decode=False),
         "text": datasets.Value("string")}
    )  # fmt: skip
    sound = {"bytes": b"RIFF", "path": "a.wav"}
    rows = [{"photo": STRUCT, "sound": sound, "text": text} for text in "abc"]
    content = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    data = datasets.Dataset(datasets.table.InMemoryTable(content))
    data.save_to_disk(str(tmp_path / "saved"))
    message = "column 'photo' holds images and column 'sound' holds audio.*leave them out.*"
    for name in (InMemoryDataset(data), str(tmp_path / "saved")):
        with pytest.raises(InputError, match=f"{message}--ignore-columns photo sound"):
            load_splits(name)
        table = load_splits(name, ignored=("photo", "sound", "none")).train
        assert table.column_names == ["text"]
        assert table.ignored == ("photo", "sound")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, "has a part of type 'image', and ftlevel trains on text only"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "has a part of type 'image_url'"),
        ({"type": "input_audio", "input_audio": {}}, "has a part of type 'input_audio'"),
        ({"image": "a.png"}, "has a part of type 'image'"),
        ({"type": "text", "text": "and more"}, "is a list of parts, not a string; join"),
    ],
)
def test_messages_with_media_parts_are_bad_rows(part, reason, tmp_path):
    question = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}
    rows = [{"messages": [question, {"role": "assistant", "content": "a cat"}]}] * 2
    name = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InputError) as error:
        load_data(DataConfig(dataset=name), TASKS["text-generation"], 0)
    assert f"rows.jsonl:1: 'content' of turn 1 of 'messages' {reason}" in error.value.problems[0]


def test_ignored_column_of_rows_in_memory_is_removed():
    rows = [{"image": object(), "text": f"cat {i}"} for i in range(3)]
    table = load_splits(InMemoryDataset(rows), ignored=("image",)).train
    assert table.rows == [{"text": "cat 0"}, {"text": "cat 1"}, {"text": "cat 2"}]
    assert (table.column_names, table.ignored) == (["text"], ("image",))
    with pytest.raises(InputError, match="column 'image' holds images"):
        load_data(DataConfig(dataset=InMemoryDataset(rows)), TASKS["text-generation"], 0)
