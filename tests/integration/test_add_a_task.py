"""Adding a task: one file and one line, tested with `rank` in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from additions.tree import TARGET, run

pytestmark = pytest.mark.slow
GOOD, BAD = "a clear and quiet morning", "noise noise noise"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TARGET.apply(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def trained(tree: Path, work: Path) -> dict:
    return json.loads(
        run(
            tree, "train", "--task", "rank", "--dataset", "data", "--max-steps", 20,
            "--learning-rate", "2e-2", "--output-dir", "run", "--json",
            "--set", "data.gate.near_duplicates=ignore", cwd=work,
        )
    )  # fmt: skip


def test_it_takes_one_file_and_one_line() -> None:
    assert len(TARGET.files) == len(TARGET.lines) == 1
    assert len(TARGET.touched) <= 3


def test_it_trains(trained: dict) -> None:
    assert trained["task"] == "rank"
    assert trained["metrics"]["ranked_right"] > 0.8, "the two kinds of text are far apart"
    assert trained["proof"]["adapter_effect"] > 0


def test_it_evaluates(tree: Path, work: Path, trained: dict) -> None:
    found = json.loads(run(tree, "evaluate", "run", "--json", cwd=work))
    expected = trained["metrics"]["ranked_right"]
    assert found["metrics"]["ranked_right"] == pytest.approx(expected)


def test_it_is_previewed(tree: Path, work: Path) -> None:
    told = run(tree, "preview", "--task", "rank", "--dataset", "data", "--json",
               "--set", "data.gate.near_duplicates=ignore", cwd=work)  # fmt: skip
    assert json.loads(told)["rows"][0]["label"] in ("first is better", "second is better")


def test_it_answers(tree: Path, work: Path, trained: dict) -> None:
    told = run(tree, "generate", "run", "--prompt", f"{GOOD} ||| {BAD}", "--prompt",
               f"{BAD} ||| {GOOD}", "--json", cwd=work)  # fmt: skip
    assert [answer["text"] for answer in json.loads(told)["answers"]] == ["first", "second"]


def test_it_predicts(tree: Path, work: Path, trained: dict) -> None:
    (work / "new.csv").write_text(f"id,first,second\n1,{GOOD},{BAD}\n2,{BAD},{GOOD}\n")
    run(tree, "predict", "run", "--dataset", "new.csv", "--output", "told.csv",
        "--probabilities", cwd=work)  # fmt: skip
    header, *rows = (work / "told.csv").read_text().splitlines()
    assert header == "id,first,second,prediction,prediction_probability"
    assert [row.split(",")[3] for row in rows] == ["first", "second"]


def test_it_merges(tree: Path, work: Path, trained: dict) -> None:
    run(tree, "merge", "run", "--out", "merged", cwd=work)
    assert (work / "merged/model.safetensors").is_file()


def test_without_the_line_it_is_unknown(work: Path) -> None:
    told = run(Path(__file__).parents[2] / "src", "train", "--task", "rank", cwd=work, code=2)
    assert "rank" in told
