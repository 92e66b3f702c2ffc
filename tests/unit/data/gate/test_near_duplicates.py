"""Near duplicates share 80 % of the words of prompt and answer; without false positives."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from ftlevel.data.formats.examples import LabeledText, PlainText, SourceTarget
from ftlevel.data.gate import near_duplicates, similarity
from ftlevel.data.gate.checks import TextCheckContext
from ftlevel.data.gate.near_duplicates import SIMILARITY, match_texts, match_training_texts
from ftlevel.data.gate.similarity import Digests, words_path

SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "za", "chi", "gra", "plo", "sku"]


def make_digests(*examples: object) -> Digests:
    return Digests.of(examples, TextCheckContext())  # type: ignore[arg-type]


def make_text_digests(texts: list[str]) -> Digests:
    return make_digests(*(PlainText(text, i) for i, text in enumerate(texts)))


def get_near_pairs(*examples: object) -> list[tuple[int, int]]:
    digests = make_digests(*examples)
    matches, first = match_texts(digests, np.zeros(len(digests), dtype=bool))
    return list(zip(matches.tolist(), first.tolist(), strict=True))


def get_near_texts(texts: list[str]) -> list[tuple[int, int]]:
    return get_near_pairs(*(PlainText(text, i) for i, text in enumerate(texts)))


def random_words(seed: int, count: int = 3_000) -> list[str]:
    generator = random.Random(seed)
    return [
        "".join(generator.choice(SYLLABLES) for _ in range(generator.randrange(2, 5)))
        for _ in range(count)
    ]


def random_texts(count: int, length: int, seed: int = 0) -> list[str]:
    words, generator = random_words(seed), random.Random(seed + 1)
    return [" ".join(generator.choices(words, k=length)) for _ in range(count)]


def modify_text(text: str, change: str, generator: random.Random) -> str:
    words = text.split()
    position = generator.randrange(1, len(words))
    if change == "replace":
        words[position] = "qqq"
    elif change == "insert":
        words.insert(position, "very")
    elif change == "delete":
        del words[position]
    elif change == "swap":
        words[position - 1], words[position] = words[position], words[position - 1]
    elif change == "case and punctuation":
        words = [w.upper() + "!" for w in words]
    return " ".join(words)


def jaccard(one: str, other: str) -> float:
    words, others = set(one.split()), set(other.split())
    return len(words & others) / len(words | others)


CHANGES = ("replace", "insert", "delete", "swap", "case and punctuation")


@pytest.mark.parametrize("length", [10, 40, 300])
@pytest.mark.parametrize("change", CHANGES)
def test_text_with_few_changes_is_found(length, change):
    generator = random.Random(5)
    rows = random_texts(200, length)
    copies = [modify_text(rows[i], change, generator) for i in range(0, 100, 4)]
    matches = get_near_texts([*rows, *copies])
    expected = [(200 + k, 4 * k) for k in range(25)]
    assert [pair for pair in matches if pair[0] < 200] == []
    assert len(set(expected) & set(matches)) >= 24


def test_similarity_is_the_threshold():
    generator, rows = random.Random(3), random_texts(300, 30)
    copies = []
    for row in rows:
        words = row.split()
        for position in generator.sample(range(30), generator.randrange(1, 8)):
            words[position] = "q" * generator.randrange(1, 9)
        copies.append(" ".join(words))
    expected = {i for i in range(300) if jaccard(rows[i], copies[i]) >= SIMILARITY}
    matches = {row - 300 for row, first in get_near_texts([*rows, *copies]) if row - 300 == first}
    assert 100 < len(expected) < 200
    assert matches <= expected
    assert len(matches) >= 0.97 * len(expected), "the documented probability is 0.985"


@pytest.mark.parametrize(
    "pair",
    [
        ("the capital of France", "the capital of Spain"),
        ("a native or inhabitant of Burundi", "a native or inhabitant of Slovakia"),
        ("in 1904 it rained a lot", "in 1905 it rained a lot"),
        ("Alice beats Bob", "Bob beats Alice"),
    ],
)
def test_short_texts_with_different_words_are_not_duplicates(pair):
    assert get_near_texts([*random_texts(30, 9), *pair]) == []


def test_pairs_with_different_prompts_or_answers_are_not_duplicates():
    question = "Is there a method of the series that tells whether all of its strings are {}"
    rows = [(random_texts(1, 20, i)[0], random_texts(1, 9, i + 50)[0]) for i in range(30)]
    rows += [(question.format("decimal"), "It tells whether all are decimal")]
    rows += [(question.format("uppercase"), "It tells whether all are uppercase")]
    assert get_near_pairs(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == []
    rows[-1] = (rows[-1][0], rows[-2][1])
    assert get_near_pairs(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == [(31, 30)]
    rows[-2:] = [(rows[-1][0], "<"), (rows[-2][0], ">")]  # answers without words
    assert get_near_pairs(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == []


def test_rows_of_different_classes_are_not_duplicates():
    rest = [LabeledText(text, None, "x", i) for i, text in enumerate(random_texts(30, 9))]
    text = rest[3].text
    assert get_near_pairs(*rest, LabeledText(f"{text} indeed", None, "x", 30)) == [(30, 3)]
    assert get_near_pairs(*rest, LabeledText(f"{text} indeed", None, "y", 30)) == []


def test_common_words_are_ignored():
    order = " ".join(random_texts(1, 40, 9))
    assert get_near_texts([f"{order} {text}" for text in random_texts(30, 6)]) == []


def test_chinese_characters_count_as_words():
    rest = [PlainText(text, i) for i, text in enumerate(random_texts(30, 9))]
    text = "这个函数返回一个新的数组其中每个元素都是原来的两倍"
    assert get_near_pairs(*rest, PlainText(text, 30), PlainText(text[:-1] + "半", 31)) == [(31, 30)]


def test_known_duplicates_are_skipped():
    texts = random_texts(30, 12)
    skip = np.arange(31) == 30
    assert match_texts(make_text_digests([*texts, texts[3] + " so"]), skip)[0].tolist() == []


def test_near_duplicates_between_validation_and_training():
    train, generator = random_texts(300, 12), random.Random(1)
    copies = [modify_text(train[7 * i], "replace", generator) for i in range(20)]
    validation = make_text_digests([*random_texts(40, 12, 77), *copies])
    matches, training_rows = match_training_texts(validation, make_text_digests(train))
    assert matches.tolist() == list(range(40, 60))
    assert training_rows.tolist() == [7 * i for i in range(20)]


def test_no_rows_or_no_words_have_no_near_duplicates():
    assert get_near_texts([]) == []
    assert get_near_texts(["!", "?"]) == []
    none, one = make_digests(), make_text_digests(["a b c d e"])
    for pair in ((none, one), (one, none), (none, none)):
        assert match_training_texts(*pair)[0].tolist() == []


def test_grouped_search_matches_search_in_memory(tmp_path, monkeypatch):
    generator, rows = random.Random(2), random_texts(400, 11)
    rows += [modify_text(rows[i], "delete", generator) for i in range(0, 100)]
    digests = make_text_digests(rows)
    skip = np.zeros(500, dtype=bool)
    expected = [side.tolist() for side in match_texts(digests, skip)]
    assert len(expected[0]) >= 97
    path = tmp_path / "train.digests"
    for file, content in zip((path, words_path(path)), digests.to_bytes(), strict=True):
        file.write_bytes(content)
    monkeypatch.setattr(near_duplicates, "_GROUP_WORDS", 100)
    monkeypatch.setattr(similarity, "PART_KEYS", 50)
    assert [side.tolist() for side in match_texts(Digests.at(path), skip)] == expected


def template_rows(count: int) -> list[str]:
    """Return rows from 200 sentences with two words replaced."""
    words, generator = random_words(11), random.Random(12)
    sentences = [generator.choices(words, k=10) for _ in range(200)]
    rows = []
    for _ in range(count):
        row = list(generator.choice(sentences))
        row[3], row[6] = generator.choices(words, k=2)
        rows.append(" ".join(row))
    return rows


def equal_rows(count: int) -> list[str]:
    return random_texts(1, 20) * count


@pytest.mark.parametrize("create_rows", [template_rows, equal_rows])
def test_20000_similar_rows_take_under_three_seconds(create_rows):
    texts = create_rows(20_000)
    digests, known = make_text_digests(texts), make_text_digests(texts[:10_000])
    start = time.process_time()
    match_texts(digests, np.zeros(len(digests), dtype=bool))
    match_training_texts(digests, known)
    assert time.process_time() - start < 3
