"""Near duplicates by words, in short and long texts, without false positives."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlevel.data.formats.examples import LabeledText, PlainText, SourceTarget
from ftlevel.data.gate import wordings
from ftlevel.data.gate.checks import TextCheckContext
from ftlevel.data.gate.similarity import Digests, words_path
from ftlevel.data.gate.wordings import (
    TextBatch,
    compute_edit_distances,
    is_typo,
    match_texts,
    match_training_texts,
)

SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "za", "chi", "gra", "plo", "sku"]


def make_digests(*examples: object) -> Digests:
    return Digests.of(examples, TextCheckContext())  # type: ignore[arg-type]


def get_near_pairs(*examples: object) -> list[tuple[int, int]]:
    digests = make_digests(*examples)
    matches, first = match_texts(digests, np.zeros(len(digests), dtype=bool))
    return list(zip(matches.tolist(), first.tolist(), strict=True))


def random_word(generator: random.Random) -> str:
    return "".join(generator.choice(SYLLABLES) for _ in range(generator.randrange(2, 5)))


def random_words(seed: int, count: int = 3_000) -> list[str]:
    generator = random.Random(seed)
    return [random_word(generator) for _ in range(count)]


def random_texts(count: int, length: int, seed: int = 0) -> list[str]:
    words, generator = random_words(seed), random.Random(seed + 1)
    return [" ".join(generator.choices(words, k=length)) for _ in range(count)]


def modify_text(text: str, change: str, generator: random.Random) -> str:
    words = text.split()
    position = generator.randrange(len(words))
    if change == "replace":
        words[position] = "qqq"
    elif change == "replace two":
        words[position] = words[position - 1] = "qqq"
    elif change == "insert":
        words.insert(position, "very")
    elif change == "delete":
        del words[position]
    elif change == "typo":
        position = max(range(len(words)), key=lambda i: len(words[i]))
        words[position] = (
            words[position][:2] + words[position][3] + words[position][2] + words[position][4:]
        )
    elif change == "swap":
        position = max(1, position)
        words[position - 1], words[position] = words[position], words[position - 1]
    elif change == "case and punctuation":
        words = [w.upper() + "!" for w in words]
    return " ".join(words)


@pytest.mark.parametrize(
    ("length", "change"),
    [
        *((length, change) for length in (10, 40, 300)
          for change in ("replace", "replace two", "insert", "delete", "typo", "swap",
                      "case and punctuation")),
        (5, "typo"),
    ],
)  # fmt: skip
def test_text_with_few_changes_is_found(length: int, change: str) -> None:
    generator = random.Random(5)
    rows = random_texts(200, length)
    copies = [modify_text(rows[i], change, generator) for i in range(0, 100, 4)]
    matches = get_near_pairs(*(PlainText(text, i) for i, text in enumerate([*rows, *copies])))
    expected = [(200 + k, 4 * k) for k in range(25)]
    assert [pair for pair in matches if pair[0] < 200] == []
    assert len(set(expected) & set(matches)) >= 24


@pytest.mark.parametrize(
    "pair",
    [
        ("the capital of France", "the capital of Spain"),
        ("a native or inhabitant of Burundi", "a native or inhabitant of Slovakia"),
        ("in 1904 it rained a lot", "in 1905 it rained a lot"),
        ("one two three four five six seven", "seven six five four three two one"),
    ],
)
def test_short_texts_with_different_words_are_not_duplicates(pair: tuple[str, str]) -> None:
    rest = random_texts(30, 9)
    assert get_near_pairs(*(PlainText(text, i) for i, text in enumerate([*rest, *pair]))) == []


def test_pairs_with_different_prompts_and_answers_are_not_duplicates() -> None:
    question = "Is there a method of the series that tells whether all of its strings are {}"
    rows = [(random_texts(1, 20, i)[0], random_texts(1, 9, i + 50)[0]) for i in range(30)]
    rows += [(question.format("decimal"), "It tells whether all are decimal")]
    rows += [(question.format("uppercase"), "It tells whether all are uppercase")]
    assert get_near_pairs(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == []
    rows[-1] = (rows[-1][0], rows[-2][1])
    assert get_near_pairs(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == [(31, 30)]


def test_rows_of_different_classes_are_not_duplicates() -> None:
    rest = [LabeledText(text, None, "x", i) for i, text in enumerate(random_texts(30, 9))]
    text = rest[3].text
    assert get_near_pairs(*rest, LabeledText(f"{text} indeed", None, "x", 30)) == [(30, 3)]
    assert get_near_pairs(*rest, LabeledText(f"{text} indeed", None, "y", 30)) == []


def test_common_words_are_ignored() -> None:
    order = " ".join(random_texts(1, 40, 9))
    rows = [f"{order} {text}" for text in random_texts(30, 4)]
    assert get_near_pairs(*(PlainText(text, i) for i, text in enumerate(rows))) == []


def test_chinese_characters_count_as_words() -> None:
    rest = [PlainText(text, i) for i, text in enumerate(random_texts(30, 9))]
    text = "这个函数返回一个新的数组其中每个元素都是原来的两倍"
    assert get_near_pairs(*rest, PlainText(text, 30), PlainText(text[:-1] + "半", 31)) == [(31, 30)]


def test_known_duplicates_are_skipped() -> None:
    rows = [
        PlainText(text, i)
        for i, text in enumerate([*random_texts(30, 12), random_texts(30, 12)[3] + " so"])
    ]
    skip = np.zeros(31, dtype=bool)
    skip[30] = True
    assert match_texts(make_digests(*rows), skip)[0].tolist() == []


def test_near_duplicates_between_validation_and_training() -> None:
    train = [PlainText(text, i) for i, text in enumerate(random_texts(300, 12))]
    generator = random.Random(1)
    validation = [PlainText(text, i) for i, text in enumerate(random_texts(40, 12, 77))]
    validation += [
        PlainText(modify_text(train[7 * i].text, "replace", generator), 40 + i) for i in range(20)
    ]
    matches, training_rows = match_training_texts(make_digests(*validation), make_digests(*train))
    assert matches.tolist() == list(range(40, 60))
    assert training_rows.tolist() == [7 * i for i in range(20)]


def test_no_rows_or_no_words_have_no_near_duplicates() -> None:
    assert get_near_pairs() == []
    assert get_near_pairs(PlainText("!", 0), PlainText("?", 1)) == []
    no_digests = make_digests()
    assert match_training_texts(no_digests, make_digests(PlainText("a b c d", 0)))[0].tolist() == []
    assert match_training_texts(make_digests(PlainText("a b c d", 0)), no_digests)[0].tolist() == []


def test_chunked_search_matches_search_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(2)
    rows = random_texts(400, 11)
    rows += [modify_text(rows[i], "typo", generator) for i in range(0, 100)]
    digests = make_digests(*(PlainText(text, i) for i, text in enumerate(rows)))
    skip = np.zeros(500, dtype=bool)
    expected = [side.tolist() for side in match_texts(digests, skip)]
    assert len(expected[0]) >= 98
    path = tmp_path / "train.digests"
    path.write_bytes(digests.to_bytes()[0])
    words_path(path).write_bytes(digests.to_bytes()[1])
    monkeypatch.setattr(wordings, "_GROUP_WORDS", 100)
    monkeypatch.setattr(wordings, "_CHUNK_WORDS", 300)
    assert [side.tolist() for side in match_texts(Digests.at(path), skip)] == expected


def test_many_similar_rows_are_fast() -> None:
    rows = [PlainText(f"the same words in row {i} of the set, again and again", i)
            for i in range(20_000)]  # fmt: skip
    digests = make_digests(*rows)
    start = time.perf_counter()
    match_texts(digests, np.zeros(len(rows), dtype=bool))
    assert time.perf_counter() - start < 20


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


def shuffled_rows(count: int) -> list[str]:
    """Return rows of the words of 200 sentences in random order; word counts are equal."""
    sentences, generator = random_texts(200, 10), random.Random(13)
    rows = []
    for _ in range(count):
        row = generator.choice(sentences).split()
        generator.shuffle(row)
        rows.append(" ".join(row))
    return rows


@pytest.mark.parametrize("create_rows", [template_rows, shuffled_rows])
def test_20000_template_rows_take_under_three_seconds(create_rows: Any) -> None:
    digests = make_digests(*(PlainText(text, i) for i, text in enumerate(create_rows(20_000))))
    start = time.process_time()
    match_texts(digests, np.zeros(len(digests), dtype=bool))
    assert time.process_time() - start < 3
    num_words = int(
        digests.records["prompt"][:10_000].sum() + digests.records["answer"][:10_000].sum()
    )
    known = Digests(digests.records[:10_000], digests.words[:num_words])
    start = time.process_time()
    match_training_texts(Digests(digests.records[10_000:], digests.words[num_words:]), known)
    assert time.process_time() - start < 3


def encode_words(text: str) -> list[int]:
    return make_digests(PlainText(text, 0)).words.tolist()


def make_batch(*rows: list[int]) -> TextBatch:
    words = np.zeros((max(map(len, rows)), len(rows)), dtype=np.uint32)
    for i, row in enumerate(rows):
        words[: len(row), i] = row
    return TextBatch(words, np.array([len(row) for row in rows]))


def reference_distance(a: list[int], b: list[int]) -> int:
    """Return the optimal string alignment distance: 1 for a typo, 2 for any other edit."""
    table = [[2 * (i + j) for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            step = 0 if a[i - 1] == b[j - 1] else 1 if is_typo(a[i - 1], b[j - 1]) else 2
            costs = [table[i - 1][j - 1] + step, table[i - 1][j] + 2, table[i][j - 1] + 2]
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                costs.append(table[i - 2][j - 2] + 2)
            table[i][j] = min(costs)
    return table[-1][-1]


def test_edit_distances_match_reference() -> None:
    generator = random.Random(5)
    words = encode_words("house houses huose garden gadren tree 1904 a street")
    first_texts = [generator.choices(words, k=generator.randrange(0, 12)) for _ in range(3_000)]
    second_texts = [generator.choices(words, k=generator.randrange(0, 12)) for _ in first_texts]
    for i in range(0, len(first_texts), 2):  # every second pair is nearly equal
        second_texts[i] = list(first_texts[i])
        for _ in range(generator.randrange(4)):
            position = generator.randrange(len(second_texts[i]) + 1)
            second_texts[i][position : position + generator.randrange(3)] = generator.choices(
                words, k=1
            )
    expected = np.array(
        [reference_distance(a, b) for a, b in zip(first_texts, second_texts, strict=True)]
    )
    matches = compute_edit_distances(make_batch(*first_texts), make_batch(*second_texts))
    assert set(range(7)) <= set(expected.tolist())
    assert matches[expected <= 6].tolist() == expected[expected <= 6].tolist()
    assert (matches[expected > 6] > 6).all()


@pytest.mark.parametrize(
    ("first", "second", "half_words"),
    [
        ("a b c d", "a b c d", 0),
        ("a b c d", "a x c d", 2),
        ("a b c d", "a c b d", 2),
        ("a b c d", "b c d", 2),
        ("a b c d", "a b c d e", 2),
        ("a parser reads", "a praser reads", 1),
        ("a parser reads", "a parsre raeds", 2),
        ("a bad man", "a bda man", 2),  # three letters are too few for a typo
        ("in 1904 there", "in 1905 there", 2),
    ],
)
def test_edit_distance_in_half_words(first: str, second: str, half_words: int) -> None:
    a, b = make_batch(encode_words(first)), make_batch(encode_words(second))
    assert compute_edit_distances(a, b).tolist() == [half_words]
    assert compute_edit_distances(b, a).tolist() == [half_words]


def test_is_typo() -> None:
    def is_typo_of(first: str, second: str) -> bool:
        return bool(is_typo(encode_words(first)[0], encode_words(second)[0]))

    assert is_typo_of("argument", "arguement")
    assert is_typo_of("received", "recieved")
    assert not is_typo_of("mother", "father")
    assert not is_typo_of("upwards", "leftwards")
    assert not is_typo_of("man", "men")
