"""Loading splits from built-in datasets, files, directories, saved datasets and the Hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

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


def test_file_has_only_training_rows() -> None:
    save_rows(Path("a.jsonl"), ["x", "y"])
    splits = load_splits("a.jsonl")
    assert get_texts(splits.train) == ["x", "y"]
    assert (splits.validation, splits.test, splits.notes) == (None, None, [])
    with pytest.raises(InputError, match=r"^--split dev: a\.jsonl is one file, without splits\."):
        load_splits("a.jsonl", split="dev")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_directory_has_one_file_per_split(name: str) -> None:
    save_rows(Path("d/train.jsonl"), ["a"])
    Path(f"d/{name}.csv").write_text("text\nb\n")
    Path("d/test.txt").write_text("c\n")
    Path("d/README.md").write_text("about")
    splits = load_splits("d")
    assert get_texts(splits.train) == ["a"]
    assert get_texts(splits.validation) == ["b"]
    assert get_texts(splits.test) == ["c"]
    assert splits.notes == []


def test_train_on_another_split_of_directory() -> None:
    for name in ("train", "extra", "val"):
        save_rows(Path(f"d/{name}.jsonl"), [name])
    splits = load_splits("d", split="extra")
    assert (get_texts(splits.train), get_texts(splits.validation)) == (["extra"], ["val"])
    assert splits.notes == ["d: trains on split 'extra' of extra, train, validation"]
    splits = load_splits("d", split="val")
    assert (get_texts(splits.train), splits.validation) == (["val"], None)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (
            ["data.jsonl"],
            None,
            "d: has no train file. Files in it: data.jsonl. Add train.jsonl, or name one file: "
            "--dataset d/data.jsonl",
        ),
        (
            ["trian.jsonl"],
            None,
            "d: has no train file. Did you mean 'trian'? Files in it: trian.jsonl. Add "
            "train.jsonl, or name one file: --dataset d/trian.jsonl",
        ),
        (
            ["notes.md"],
            None,
            "d: has no train file. It holds no data file. Add train.jsonl, or name one file: "
            "--dataset d/FILE",
        ),
        (
            ["train.csv", "train.jsonl"],
            None,
            "d: 'train.csv' and 'train.jsonl' are both its train split. Remove one.",
        ),
        (
            ["train.jsonl", "dev.jsonl", "val.jsonl"],
            None,
            "d: 'dev.jsonl' and 'val.jsonl' are both its validation split. Remove one.",
        ),
    ],
)
def test_ambiguous_directories_raise(files: list[str], split: str | None, message: str) -> None:
    for name in files:
        save_rows(Path("d") / name, ["x"])
    with pytest.raises(InputError) as error:
        load_splits("d", split=split)
    assert str(error.value) == message


def test_errors_of_all_files_are_reported_together() -> None:
    save_rows(Path("d/train.jsonl"), ["x"])
    Path("d/val.jsonl").write_text("oops\n")
    Path("d/test.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        load_splits("d")
    assert [problem.partition(": ")[0] for problem in error.value.problems] == [
        "d/val.jsonl:1",
        "d/test.jsonl",
    ]


def test_dropped_rows_are_reported() -> None:
    save_rows(Path("a.jsonl"), ["x", "y"])
    with Path("a.jsonl").open("a") as stream:
        stream.write("oops\n")
    splits = load_splits("a.jsonl", on_bad_row="skip", max_samples=1)
    assert get_texts(splits.train) == ["x"]
    assert splits.notes == [
        "a.jsonl: dropped 1 of 3 rows (line 3: not valid JSON (Expecting value, column 1))"
    ]


def test_saved_datasets_keep_label_names() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features)
    data.save_to_disk("one")
    shuffled = data.select([2, 0])
    datasets.DatasetDict({"train": data, "validation": shuffled}).save_to_disk("two")
    one = load_splits("one", max_samples=2).train
    assert one.rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert one.label_names == {"label": ("no", "yes")}
    two = load_splits("two")
    assert get_texts(two.validation) == ["c", "a"]
    assert two.validation is not None
    assert two.validation.where(1) == "two (validation) row 2"
    with pytest.raises(InputError) as error:
        load_splits("two", split="tran")
    assert str(error.value) == (
        "--split tran: no such split of two. Did you mean 'train'? Splits: train, validation."
    )
    Path("two/validation/state.json").write_text("{")
    with pytest.raises(InputError, match=r"^two: not a readable save_to_disk directory \("):
        load_splits("two")


def test_builtin_dataset_is_loaded_by_kind_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, int | None]] = []

    def load_docstrings(kind: str, split: str, limit: int | None = None) -> list[dict[str, str]]:
        calls.append((kind, split, limit))
        return [{"text": f"{split} {n}"} for n in range(3)][:limit]

    monkeypatch.setattr("ftlevel.data.sources.splits.load_docstrings", load_docstrings)
    splits = load_splits("builtin:docstrings", subset="summarization", max_samples=2)
    assert calls == [("summarization", split, 2) for split in ("train", "validation", "test")]
    assert get_texts(splits.train) == ["train 0", "train 1"]
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
        ("train.csv", "train.csv: no such file. Did you mean 'train'? In the current directory: "),
        ("a/b/c", "a/b/c: no such file, and no directory a/b. Check the path."),
        ("what is it", "what is it: no such file. In the current directory: train."),
        (
            "train/set",
            "train/set: no such file. In train: no files. If you mean the data set of the Hub: "
            "--dataset hf://datasets/train/set",
        ),
    ],
)
def test_paths_are_not_looked_up_on_the_hub(dataset: str, message: str) -> None:
    Path("train").mkdir()
    with pytest.raises(InputError) as error:
        load_splits(dataset)
    assert str(error.value).startswith(message)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("dataset", ["trian", "org/trian", "hf://datasets/org/trian"])
def test_offline_mode_raises_within_seconds(dataset: str) -> None:
    Path("train").mkdir()
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        load_splits(dataset)
    assert time.monotonic() - start < 5
    name = dataset.removeprefix("hf://datasets/")
    assert str(error.value) == (
        f"--dataset {name}: no file or directory here has this name, and the Hugging Face Hub "
        "can't be reached (offline mode: HF_HUB_OFFLINE is set); no copy is in the cache. Connect "
        "once to download it, copy the cache directory of a machine that has it (HF_HOME), name a "
        "local file, or use --dataset builtin:docstrings."
        + (" Did you mean 'train'?" if name == "trian" else "")
    )


def test_no_network_uses_cache_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    offline_values: list[bool] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Name or service not known")

    def load_dataset(name: str, subset: str | None, split: str | None = None) -> Any:
        offline_values.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    splits = load_splits("imdb")
    assert offline_values == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert splits.notes == [
        "imdb: the Hub was not reached (Name or service not known); used the copy in the cache"
    ]


def fake_hub(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str | None = None) -> Any:
        calls.append((name, subset, split))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_hold_out_is_a_seeded_partition() -> None:
    splits = load(100)
    first, repeated, other_seed = (hold_out(splits, 0.1, seed) for seed in (1, 1, 2))
    assert first == repeated
    assert first.validation != other_seed.validation
    assert first.validation is not None
    train, num_validation = first.train.lines, first.validation.lines
    assert (len(train), len(num_validation)) == (90, 10)
    assert sorted(train + num_validation) == list(range(1, 101))
    assert train == sorted(train)
    assert num_validation == sorted(num_validation)
    assert first.notes == ["validation: 10 of 100 rows held out of train (seed 1)"]
    assert hold_out(splits, 0, 1) is splits


def test_hold_out_keeps_existing_validation() -> None:
    splits = hold_out(load(10), 0.2, 1)
    repeated = hold_out(splits, 0.5, 1)
    assert (repeated.train, repeated.validation) == (splits.train, splits.validation)
    assert repeated.notes[-1] == (
        "a.jsonl: has its own validation split; --validation-split is not used"
    )


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_hold_out_with_empty_part_raises(share: float) -> None:
    with pytest.raises(InputError, match=r"--validation-split 0\.\d+: holds \d of 4 rows"):
        hold_out(load(4), share, 1)


def test_suggested_shares_leave_rows_in_both_parts() -> None:
    splits = load(300)
    with pytest.raises(InputError) as error:
        hold_out(splits, 0.0005, 1)
    assert "Use a share between 0.003334 and 0.996666, or a validation file." in str(error.value)
    for share, num_validation in ((0.003334, 1), (0.996666, 299)):
        validation = hold_out(splits, share, 1).validation
        assert validation is not None
        assert len(validation) == num_validation
    with pytest.raises(InputError, match=r"need a row[.] Use a validation file"):
        hold_out(load(1), 0.5, 1)


def test_limit_rows() -> None:
    splits = load(5)
    assert limit_rows(splits, None) is splits
    assert limit_rows(splits, 9) == splits
    assert get_texts(limit_rows(splits, 2).train) == ["0", "1"]
