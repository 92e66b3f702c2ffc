"""Several datasets mixed into one: row locations, exact shares, no repeated rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.config import DataConfig
from ftlevel.data.prepare.loading import read_splits
from ftlevel.data.sources.splits import join_splits, load_splits
from ftlevel.data.sources.table import BadRow, Table, join_tables, mix_tables
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS


def make_table(name: str, count: int, *dropped: BadRow) -> Table:
    rows = [{"text": f"{name}{i}"} for i in range(count)]
    return Table(rows, [2 * i + 1 for i in range(count)], f"{name}.jsonl", dropped=dropped)


def test_joined_rows_keep_their_locations() -> None:
    joined = join_tables(
        [make_table("a", 4, BadRow(12, "bad")), make_table("b", 2), make_table("c", 1)]
    )
    assert joined.source == "a.jsonl + b.jsonl + c.jsonl"
    locations = {row["text"]: joined.where(i) for i, row in enumerate(joined.rows)}
    assert locations == {
        "a0": "a.jsonl:1", "a1": "a.jsonl:3", "a2": "a.jsonl:5", "a3": "a.jsonl:7",
        "b0": "b.jsonl:1", "b1": "b.jsonl:3", "c0": "c.jsonl:1",
    }  # fmt: skip
    assert joined.location(joined.dropped[0].line) == "a.jsonl:12"
    selected = joined.take([0, 3])
    assert [selected.where(0), selected.where(1)] == [joined.where(0), joined.where(3)]


def test_first_joined_rows_are_proportional() -> None:
    joined = join_tables([make_table("a", 90), make_table("b", 30)])
    first = Counter(row["text"][0] for row in joined.rows[:40])
    assert first == {"a": 30, "b": 10}


def test_joining_different_columns_raises() -> None:
    other_table = Table([{"content": "x"}], [1], "b.jsonl")
    with pytest.raises(InputError) as error:
        join_tables([make_table("a", 1), other_table])
    assert str(error.value) == (
        "b.jsonl: has the columns 'content', and a.jsonl has 'text'. Data sets that are trained on "
        "together need the same columns."
    )


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=2, max_size=4),
    st.integers(0, 9),
)
def test_mixing_shares_without_repeated_rows(sets: list[tuple[int, float]], seed: int) -> None:
    tables = [make_table("abcd"[i], count) for i, (count, _) in enumerate(sets)]
    shares = [share for _, share in sets]
    total = min(len(t) * sum(shares) / s for t, s in zip(tables, shares, strict=True))
    if any(int(total * share / sum(shares) + 1e-9) < 1 for share in shares):
        with pytest.raises(InputError, match="leaves no row"):
            mix_tables(tables, shares, seed)
        return
    mixed, notes = mix_tables(tables, shares, seed)
    texts = [row["text"] for part in mixed for row in part.rows]
    assert len(texts) == len(set(texts))
    assert any(len(part) == len(table) for part, table in zip(mixed, tables, strict=True))
    for part, share in zip(mixed, shares, strict=True):
        assert abs(len(part) - total * share / sum(shares)) <= 1
    assert len(notes) == 1


def test_mixing_datasets_with_and_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a/train", 4), ("a/validation", 2), ("b", 6)):
        path = Path(f"{name}.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count)))
    parts = [load_splits("a"), load_splits("b.jsonl")]
    joined = join_splits(parts, [1, 1], seed=0)
    assert (len(joined.train), joined.name) == (8, "a + b.jsonl")
    assert joined.validation is not None
    assert joined.validation.where(1) == "a/validation.jsonl:2"
    assert joined.notes == ["mixed 1 : 1: 4 of 4 rows of a/train.jsonl, 4 of 6 rows of b.jsonl"]


def test_directory_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for i in range(3):
        Path(f"d/part-{i}.jsonl").write_text(json.dumps({"text": f"t{i}"}) + "\n")
    splits = load_splits("d")
    assert sorted(row["text"] for row in splits.train.rows) == ["t0", "t1", "t2"]
    assert splits.notes == [
        "d: reads all of part-0.jsonl, part-1.jsonl, part-2.jsonl as training rows"
    ]


def test_joining_different_label_names_raises() -> None:
    """Class ids would have different meanings."""
    rows = [{"text": "a", "label": 0}]
    first = Table(rows, [1], "one", label_names={"label": ("no", "yes")})
    same = Table(rows, [1], "same", label_names={"label": ("no", "yes")})
    different = Table(rows, [1], "other", label_names={"label": ("yes", "no")})
    assert join_tables([first, same]).label_names == {"label": ("no", "yes")}
    with pytest.raises(InputError, match=r"^other: the classes of 'label' are yes, no, and those"):
        join_tables([first, different])
    with pytest.raises(InputError, match=r"and those of one are no, yes\."):
        join_tables([replace(first, label_names={}, source="none"), first, different])


def test_joined_tables_have_all_label_names() -> None:
    tables = [make_table("a", 2), replace(make_table("b", 2), label_names={"text": ("x", "y")})]
    for joined in (join_tables(tables), join_tables(tables[::-1])):
        assert joined.label_names == {"text": ("x", "y")}


def test_rows_dropped_from_the_validation_file_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "a", "completion": "b"})
    Path("train.jsonl").write_text(f"{row}\n{json.dumps({'prompt': 1, 'completion': 2})}\n{row}\n")
    Path("val.jsonl").write_text(f"{row}\noops\n")
    config = DataConfig(dataset="train.jsonl", validation_file=Path("val.jsonl"), on_bad_row="skip")
    splits = read_splits(config, TASKS["text-generation"], 0)
    assert splits.notes[0].startswith("train.jsonl: dropped 1 of 3 rows (line 2: ")
    assert splits.notes[1].startswith("val.jsonl: dropped 1 of 2 rows (line 2: not valid JSON")
    assert splits.train.num_dropped == 1
