"""Loading splits from built-in datasets, files, directories, saved datasets and the Hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from ftlevel.data.sources.docstrings import load_docstrings
from ftlevel.data.sources.splits import DatasetSplits, hold_out, limit_rows, load_splits
from ftlevel.errors import InputError


def save_rows(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def get_texts(table: Any) -> list[str] | None:
    return None if table is None else [row["text"] for row in table.rows]


@pytest.fixture(autouse=True)
def _empty_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch `huggingface_hub` to offline mode with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())


def test_file_has_only_training_rows():
    save_rows(Path("a.jsonl"), ["x", "y"])
    splits = load_splits("a.jsonl")
    assert get_texts(splits.train) == ["x", "y"]
    assert (splits.validation, splits.test, splits.notes) == (None, None, [])
    with pytest.raises(InputError, match=r"^--split dev: a\.jsonl is one file, without splits\."):
        load_splits("a.jsonl", split="dev")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_directory_has_one_file_per_split(name):
    save_rows(Path("d/train.jsonl"), ["a"])
    Path(f"d/{name}.csv").write_text("text\nb\n")
    Path("d/test.txt").write_text("c\n")
    Path("d/README.md").write_text("about")
    splits = load_splits("d")
    texts = [get_texts(table) for table in (splits.train, splits.validation, splits.test)]
    assert texts == [["a"], ["b"], ["c"]]
    assert splits.notes == []
    splits = load_splits("d", split="test")
    assert (get_texts(splits.train), get_texts(splits.validation)) == (["c"], ["b"])
    assert splits.notes == ["d: trains on split 'test' of test, train, validation"]
    splits = load_splits("d", split=name)
    assert (get_texts(splits.train), splits.validation) == (["b"], None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            "data.jsonl",
            "d: has no train file. Files in it: data.jsonl. Add train.jsonl, or name one file: "
            "--dataset d/data.jsonl",
        ),
        (
            "trian.jsonl",
            "d: has no train file. Did you mean 'trian'? Files in it: trian.jsonl. Add "
            "train.jsonl, or name one file: --dataset d/trian.jsonl",
        ),
        (
            "notes.md",
            "d: has no train file. It holds no data file. Add train.jsonl, or name one file: "
            "--dataset d/FILE",
        ),
        (
            "train.jsonl dev.jsonl val.jsonl",
            "d: 'dev.jsonl' and 'val.jsonl' are both its validation split. Remove one.",
        ),
    ],
)
def test_ambiguous_directories_raise(files, message):
    for name in files.split():
        save_rows(Path("d") / name, ["x"])
    with pytest.raises(InputError) as error:
        load_splits("d")
    assert str(error.value) == message


def test_errors_of_all_files_are_reported_together():
    save_rows(Path("d/train.jsonl"), ["x"])
    Path("d/val.jsonl").write_text("oops\n")
    Path("d/test.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        load_splits("d")
    places = [problem.partition(": ")[0] for problem in error.value.problems]
    assert places == ["d/val.jsonl:1", "d/test.jsonl"]


def test_dropped_rows_are_reported():
    save_rows(Path("a.jsonl"), ["x", "y"])
    with Path("a.jsonl").open("a") as stream:
        stream.write("oops\n")
    splits = load_splits("a.jsonl", on_bad_row="skip", max_samples=1)
    assert get_texts(splits.train) == ["x"]
    assert splits.notes == [
        "a.jsonl: dropped 1 of 3 rows (line 3: not valid JSON (Expecting value, column 1))"
    ]


def test_saved_datasets_keep_label_names():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features)
    data.save_to_disk("one")
    datasets.DatasetDict({"train": data, "validation": data.select([2, 0])}).save_to_disk("two")
    one = load_splits("one", max_samples=2).train
    assert one.rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert one.label_names == {"label": ("no", "yes")}
    two = load_splits("two")
    assert get_texts(two.validation) == ["c", "a"]
    assert two.validation.where(1) == "two (validation) row 2"
    message = (
        r"^--split tran: no such split of two\. Did you mean 'train'\? Splits: train, validation"
    )
    with pytest.raises(InputError, match=message):
        load_splits("two", split="tran")
    Path("two/validation/state.json").write_text("{")
    with pytest.raises(InputError, match=r"^two: not a readable save_to_disk directory \("):
        load_splits("two")


def test_builtin_dataset_is_loaded_by_kind_and_split():
    splits = load_splits("builtin:docstrings", subset="summarization", max_samples=2)
    for split in ("train", "validation", "test"):
        rows = load_docstrings("summarization", split, limit=2)
        assert getattr(splits, split).rows == rows
    assert splits.train.where(0) == "builtin:docstrings (train) row 1"
    with pytest.raises(InputError) as error:
        load_splits("builtin:docstring")
    assert str(error.value) == (
        "--dataset builtin:docstring: no such built-in dataset. Did you mean 'docstrings'? "
        "There is: builtin:docstrings."
    )
    with pytest.raises(InputError, match=r"^--split vaidation: .* Did you mean 'validation'\?"):
        load_splits("builtin:docstrings", split="vaidation")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./trian", "trian: no such file. Did you mean 'train'? In the current directory: train."),
        ("a/b/c", "a/b/c: no such file, and no directory a/b. Check the path."),
        ("what is it", "what is it: no such file. In the current directory: train."),
        (
            "train/set",
            "train/set: no such file. In train: no files. If you mean the data set of the Hub: "
            "--dataset hf://datasets/train/set",
        ),
    ],
)
def test_paths_are_not_looked_up_on_the_hub(dataset, message):
    Path("train").mkdir()
    with pytest.raises(InputError) as error:
        load_splits(dataset)
    assert str(error.value) == message


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("dataset", ["trian", "org/trian", "hf://datasets/org/trian"])
def test_offline_mode_raises_within_seconds(dataset):
    Path("train").mkdir()
    start = time.monotonic()
    name = dataset.removeprefix("hf://datasets/")
    with pytest.raises(InputError) as error:
        load_splits(dataset)
    assert time.monotonic() - start < 5
    assert str(error.value) == (
        f"--dataset {name}: no file or directory here has this name, and the Hugging Face Hub "
        "can't be reached (offline mode: HF_HUB_OFFLINE is set); no copy is in the cache. Connect "
        "once to download it, copy the cache directory of a machine that has it (HF_HOME), name a "
        "local file, or use --dataset builtin:docstrings."
        + (" Did you mean 'train'?" if name == "trian" else "")
    )


def test_no_network_uses_cache_without_retries(monkeypatch):
    offline_values = []

    def fail(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    rows = datasets.Dataset.from_dict({"text": ["a"]})
    fake_hub(monkeypatch, rows, lambda: offline_values.append(datasets.config.HF_HUB_OFFLINE))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    splits = load_splits("imdb", split="train")
    assert offline_values == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert splits.notes[0] == (
        "imdb: the Hub was not reached (Name or service not known); used the copy in the cache"
    )


def fake_hub(monkeypatch, result, on_call=lambda: None):
    """Replace the Hub by one with a data set or an error; return the arguments of the calls."""
    calls = []

    def load_dataset(name, subset, split=None):
        on_call()
        calls.append((name, subset, split))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_splits(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    dataset = datasets.DatasetDict({"train": rows, "dev": rows.select([1]), "unlabelled": rows})
    calls = fake_hub(monkeypatch, dataset)
    splits = load_splits("org/name", subset="en", max_samples=1)
    assert calls == [("org/name", "en", None)]
    assert get_texts(splits.train) == ["a"]
    assert get_texts(splits.validation) == ["b"]
    assert splits.train.where(0) == "org/name (train) row 1"
    calls = fake_hub(monkeypatch, rows)
    splits = load_splits("org/name", split="train[:50%]")
    assert calls == [("org/name", None, "train[:50%]")]
    assert get_texts(splits.train) == ["a", "b"]
    fake_hub(monkeypatch, datasets.DatasetDict({"a": rows, "b": rows}))
    with pytest.raises(InputError) as error:
        load_splits("name")
    assert str(error.value) == "name: has no split 'train'. Splits: a, b. Pick one with --split."
    fake_hub(monkeypatch, ValueError("Config name is missing.\nmore"))
    with pytest.raises(InputError, match=r"^--dataset name: Config name is missing\.$"):
        load_splits("name")


def load(count: int) -> DatasetSplits:
    save_rows(Path("a.jsonl"), [str(n) for n in range(count)])
    return load_splits("a.jsonl")


def test_hold_out_is_a_seeded_partition():
    splits = load(100)
    first, repeated, other_seed = (hold_out(splits, 0.1, seed) for seed in (1, 1, 2))
    assert first == repeated
    assert first.validation != other_seed.validation
    train, validation = first.train.lines, first.validation.lines
    assert (len(train), len(validation)) == (90, 10)
    assert sorted(train + validation) == list(range(1, 101))
    assert (train, validation) == (sorted(train), sorted(validation))
    assert first.notes == ["validation: 10 of 100 rows held out of train (seed 1)"]
    assert hold_out(splits, 0, 1) is splits


def test_hold_out_keeps_existing_validation():
    splits = hold_out(load(10), 0.2, 1)
    repeated = hold_out(splits, 0.5, 1)
    assert (repeated.train, repeated.validation) == (splits.train, splits.validation)
    assert repeated.notes[-1] == (
        "a.jsonl: has its own validation split; --validation-split is not used"
    )


def test_suggested_shares_leave_rows_in_both_parts():
    splits = load(300)
    message = r"0\.0005: holds 0 of 300 .* between 0\.003334 and 0\.996666, or a validation file\."
    with pytest.raises(InputError, match=message):
        hold_out(splits, 0.0005, 1)
    for share, num_validation in ((0.003334, 1), (0.996666, 299)):
        assert len(hold_out(splits, share, 1).validation) == num_validation
    with pytest.raises(InputError, match=r"0\.99: holds 4 of 4 rows"):
        hold_out(load(4), 0.99, 1)
    with pytest.raises(InputError, match=r"need a row[.] Use a validation file"):
        hold_out(load(1), 0.5, 1)


def test_limit_rows():
    splits = load(5)
    assert limit_rows(splits, None) is splits
    assert limit_rows(splits, 9) == splits
    assert get_texts(limit_rows(splits, 2).train) == ["0", "1"]
