"""Adding a task: one file and one line, tested with `rank` in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import TASK, run

pytestmark = pytest.mark.slow
GOOD, BAD = "a clear and quiet morning", "noise noise noise"


@pytest.fixture(scope="module")
def package_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TASK.apply(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for name, count in (("train", 24), ("validation", 8)):
        rows = []
        for i in range(count):
            pair = [f"{GOOD} {name} {i}", f"{BAD} {name} {i}"]
            better = "second" if i % 2 else "first"
            first, second = pair if better == "first" else pair[::-1]
            rows.append({"first": first, "second": second, "better": better})
        (folder / "data").mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def summary(package_dir: Path, work_dir: Path) -> dict:
    return json.loads(
        run(
            package_dir, "train", "--task", "rank", "--dataset", "data", "--max-steps", 20,
            "--learning-rate", "2e-2", "--output-dir", "run", "--json",
            "--set", "data.gate.near_duplicates=ignore", cwd=work_dir,
        )
    )  # fmt: skip


def test_adding_a_task_takes_one_file_and_one_line() -> None:
    assert len(TASK.files) == len(TASK.lines) == 1
    assert len(TASK.touched) <= 3


def test_added_task_trains(summary: dict) -> None:
    assert summary["task"] == "rank"
    assert summary["metrics"]["ranked_right"] > 0.8, "the two kinds of text are far apart"
    assert summary["proof"]["adapter_effect"] > 0


def test_added_task_evaluates(package_dir: Path, work_dir: Path, summary: dict) -> None:
    evaluation = json.loads(run(package_dir, "evaluate", "run", "--json", cwd=work_dir))
    expected = summary["metrics"]["ranked_right"]
    assert evaluation["metrics"]["ranked_right"] == pytest.approx(expected)


def test_added_task_previews_labels(package_dir: Path, work_dir: Path) -> None:
    output = run(package_dir, "preview", "--task", "rank", "--dataset", "data", "--json",
                 "--set", "data.gate.near_duplicates=ignore", cwd=work_dir)  # fmt: skip
    assert json.loads(output)["rows"][0]["label"] in ("first is better", "second is better")


def test_added_task_generates(package_dir: Path, work_dir: Path, summary: dict) -> None:
    output = run(package_dir, "generate", "run", "--prompt", f"{GOOD} ||| {BAD}", "--prompt",
                 f"{BAD} ||| {GOOD}", "--json", cwd=work_dir)  # fmt: skip
    assert [answer["text"] for answer in json.loads(output)["answers"]] == ["first", "second"]


def test_added_task_predicts(package_dir: Path, work_dir: Path, summary: dict) -> None:
    (work_dir / "new.csv").write_text(f"id,first,second\n1,{GOOD},{BAD}\n2,{BAD},{GOOD}\n")
    run(package_dir, "predict", "run", "--dataset", "new.csv", "--output", "told.csv",
        "--probabilities", cwd=work_dir)  # fmt: skip
    header, *rows = (work_dir / "told.csv").read_text().splitlines()
    assert header == "id,first,second,prediction,prediction_probability"
    assert [row.split(",")[3] for row in rows] == ["first", "second"]


def test_added_task_merges(package_dir: Path, work_dir: Path, summary: dict) -> None:
    run(package_dir, "merge", "run", "--out", "merged", cwd=work_dir)
    assert (work_dir / "merged/model.safetensors").is_file()


def test_unregistered_task_is_rejected(work_dir: Path) -> None:
    message = run(
        Path(__file__).parents[2] / "src", "train", "--task", "rank", cwd=work_dir, code=2
    )
    assert "rank" in message
