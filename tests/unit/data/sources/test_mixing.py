"""Several datasets mixed into one: row locations, exact shares, no repeated rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.data.sources.splits import join_splits, load_splits
from ftlevel.data.sources.table import BadRow, Table, join_tables, mix_tables
from ftlevel.errors import InputError


def make_table(name: str, count: int, *dropped: BadRow) -> Table:
    rows = [{"text": f"{name}{i}"} for i in range(count)]
    return Table(rows, [2 * i + 1 for i in range(count)], f"{name}.jsonl", dropped=dropped)


def test_joined_rows_keep_their_locations():
    joined = join_tables([make_table("a", 3, BadRow(12, "bad")), make_table("b", 2)])
    assert joined.source == "a.jsonl + b.jsonl"
    locations = {row["text"]: joined.where(i) for i, row in enumerate(joined.rows)}
    assert locations == {
        "a0": "a.jsonl:1", "a1": "a.jsonl:3", "a2": "a.jsonl:5", "b0": "b.jsonl:1",
        "b1": "b.jsonl:3",
    }  # fmt: skip
    assert joined.location(joined.dropped[0].line) == "a.jsonl:12"
    selected = joined.take([0, 3])
    assert [selected.where(0), selected.where(1)] == [joined.where(0), joined.where(3)]


def test_first_joined_rows_are_proportional():
    joined = join_tables([make_table("a", 90), make_table("b", 30)])
    first = Counter(row["text"][0] for row in joined.rows[:40])
    assert first == {"a": 30, "b": 10}


def test_joining_different_columns_raises():
    message = (
        r"^b\.jsonl: has the columns 'content', and a\.jsonl has 'text'\. Data sets that are "
        r"trained on together need the same columns\.$"
    )
    with pytest.raises(InputError, match=message):
        join_tables([make_table("a", 1), Table([{"content": "x"}], [1], "b.jsonl")])


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=2, max_size=4),
    st.integers(0, 9),
)
def test_mixing_shares_without_repeated_rows(sets, seed):
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


def write_texts(name, *texts):
    path = Path(f"{name}.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_mixing_datasets_with_and_without_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("a/train", 4), ("a/validation", 2), ("b", 6)):
        write_texts(name, *(f"{name}{i}" for i in range(count)))
    joined = join_splits([load_splits("a"), load_splits("b.jsonl")], [1, 1], seed=0)
    assert (len(joined.train), joined.name) == (8, "a + b.jsonl")
    assert joined.validation.where(1) == "a/validation.jsonl:2"
    assert joined.notes == ["mixed 1 : 1: 4 of 4 rows of a/train.jsonl, 4 of 6 rows of b.jsonl"]


def test_directory_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        write_texts(f"d/part-{i}", f"t{i}")
    splits = load_splits("d")
    assert sorted(row["text"] for row in splits.train.rows) == ["t0", "t1", "t2"]
    files = "part-0.jsonl, part-1.jsonl, part-2.jsonl"
    assert splits.notes == [f"d: reads all of {files} as training rows"]


def test_joining_different_label_names_raises():
    """Class ids would have different meanings."""

    def make(name, **label_names):
        return Table([{"text": "a", "label": 0}], [1], name, label_names=label_names)

    one, none, other = make("one", label=("no", "yes")), make("none"), make("other", label=("yes",))
    for tables in ([one, one], [one, none], [none, one]):
        assert join_tables(tables).label_names == {"label": ("no", "yes")}
    message = r"^other: the classes of 'label' are yes, and those of one are no, yes\."
    with pytest.raises(InputError, match=message):
        join_tables([none, one, other])
