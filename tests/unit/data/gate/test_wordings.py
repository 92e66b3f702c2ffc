"""Texts of nearly the same words are found, short and long; other texts of a kind are not."""

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


def digest(*examples: object) -> Digests:
    return Digests.of(examples, TextCheckContext())  # type: ignore[arg-type]


def near(*examples: object) -> list[tuple[int, int]]:
    digests = digest(*examples)
    found, first = match_texts(digests, np.zeros(len(digests), dtype=bool))
    return list(zip(found.tolist(), first.tolist(), strict=True))


def word(generator: random.Random) -> str:
    return "".join(generator.choice(SYLLABLES) for _ in range(generator.randrange(2, 5)))


def vocabulary(seed: int, count: int = 3_000) -> list[str]:
    generator = random.Random(seed)
    return [word(generator) for _ in range(count)]


def texts(count: int, length: int, seed: int = 0) -> list[str]:
    words, generator = vocabulary(seed), random.Random(seed + 1)
    return [" ".join(generator.choices(words, k=length)) for _ in range(count)]


def changed(text: str, how: str, generator: random.Random) -> str:
    words = text.split()
    at = generator.randrange(len(words))
    if how == "other":
        words[at] = "qqq"
    elif how == "two others":
        words[at] = words[at - 1] = "qqq"
    elif how == "one more":
        words.insert(at, "very")
    elif how == "one less":
        del words[at]
    elif how == "slip":
        at = max(range(len(words)), key=lambda i: len(words[i]))
        words[at] = words[at][:2] + words[at][3] + words[at][2] + words[at][4:]
    elif how == "order":
        at = max(1, at)
        words[at - 1], words[at] = words[at], words[at - 1]
    elif how == "case and marks":
        words = [w.upper() + "!" for w in words]
    return " ".join(words)


@pytest.mark.parametrize(
    ("length", "how"),
    [
        *((length, how) for length in (10, 40, 300)
          for how in ("other", "two others", "one more", "one less", "slip", "order",
                      "case and marks")),
        (5, "slip"),
    ],
)  # fmt: skip
def test_a_text_with_few_other_words_is_found(length: int, how: str) -> None:
    generator = random.Random(5)
    rows = texts(200, length)
    copies = [changed(rows[i], how, generator) for i in range(0, 100, 4)]
    found = near(*(PlainText(text, i) for i, text in enumerate([*rows, *copies])))
    expected = [(200 + k, 4 * k) for k in range(25)]
    assert [pair for pair in found if pair[0] < 200] == []
    assert len(set(expected) & set(found)) >= 24


@pytest.mark.parametrize(
    "pair",
    [
        ("the capital of France", "the capital of Spain"),
        ("a native or inhabitant of Burundi", "a native or inhabitant of Slovakia"),
        ("in 1904 it rained a lot", "in 1905 it rained a lot"),
        ("one two three four five six seven", "seven six five four three two one"),
    ],
)
def test_another_word_in_a_short_text_is_another_text(pair: tuple[str, str]) -> None:
    rest = texts(30, 9)
    assert near(*(PlainText(text, i) for i, text in enumerate([*rest, *pair]))) == []


def test_another_answer_to_another_prompt_is_no_duplicate() -> None:
    ask = "Is there a method of the series that tells whether all of its strings are {}"
    rows = [(texts(1, 20, i)[0], texts(1, 9, i + 50)[0]) for i in range(30)]
    rows += [(ask.format("decimal"), "It tells whether all are decimal")]
    rows += [(ask.format("uppercase"), "It tells whether all are uppercase")]
    assert near(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == []
    rows[-1] = (rows[-1][0], rows[-2][1])
    assert near(*(SourceTarget(*row, i) for i, row in enumerate(rows))) == [(31, 30)]


def test_another_class_is_another_row() -> None:
    rest = [LabeledText(text, None, "x", i) for i, text in enumerate(texts(30, 9))]
    text = rest[3].text
    assert near(*rest, LabeledText(f"{text} indeed", None, "x", 30)) == [(30, 3)]
    assert near(*rest, LabeledText(f"{text} indeed", None, "y", 30)) == []


def test_what_all_rows_say_is_no_likeness() -> None:
    order = " ".join(texts(1, 40, 9))
    rows = [f"{order} {text}" for text in texts(30, 4)]
    assert near(*(PlainText(text, i) for i, text in enumerate(rows))) == []


def test_characters_are_the_words_of_chinese() -> None:
    rest = [PlainText(text, i) for i, text in enumerate(texts(30, 9))]
    text = "这个函数返回一个新的数组其中每个元素都是原来的两倍"
    assert near(*rest, PlainText(text, 30), PlainText(text[:-1] + "半", 31)) == [(31, 30)]


def test_known_duplicates_are_skipped() -> None:
    rows = [PlainText(text, i) for i, text in enumerate([*texts(30, 12), texts(30, 12)[3] + " so"])]
    skip = np.zeros(31, dtype=bool)
    skip[30] = True
    assert match_texts(digest(*rows), skip)[0].tolist() == []


def test_validation_rows_that_are_nearly_training_rows() -> None:
    train = [PlainText(text, i) for i, text in enumerate(texts(300, 12))]
    generator = random.Random(1)
    held = [PlainText(text, i) for i, text in enumerate(texts(40, 12, 77))]
    held += [PlainText(changed(train[7 * i].text, "other", generator), 40 + i) for i in range(20)]
    found, which = match_training_texts(digest(*held), digest(*train))
    assert found.tolist() == list(range(40, 60))
    assert which.tolist() == [7 * i for i in range(20)]


def test_a_set_without_words_has_no_near_ones() -> None:
    assert near() == []
    assert near(PlainText("!", 0), PlainText("?", 1)) == []
    nothing = digest()
    assert match_training_texts(nothing, digest(PlainText("a b c d", 0)))[0].tolist() == []
    assert match_training_texts(digest(PlainText("a b c d", 0)), nothing)[0].tolist() == []


def test_parts_and_files_give_what_memory_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(2)
    rows = texts(400, 11)
    rows += [changed(rows[i], "slip", generator) for i in range(0, 100)]
    digests = digest(*(PlainText(text, i) for i, text in enumerate(rows)))
    skip = np.zeros(500, dtype=bool)
    whole = [side.tolist() for side in match_texts(digests, skip)]
    assert len(whole[0]) >= 98
    path = tmp_path / "train.digests"
    path.write_bytes(digests.to_bytes()[0])
    words_path(path).write_bytes(digests.to_bytes()[1])
    monkeypatch.setattr(wordings, "_GROUP_WORDS", 100)
    monkeypatch.setattr(wordings, "_CHUNK_WORDS", 300)
    assert [side.tolist() for side in match_texts(Digests.at(path), skip)] == whole


def test_many_rows_of_a_kind_take_no_quadratic_step() -> None:
    rows = [PlainText(f"the same words in row {i} of the set, again and again", i)
            for i in range(20_000)]  # fmt: skip
    digests = digest(*rows)
    began = time.perf_counter()
    match_texts(digests, np.zeros(len(rows), dtype=bool))
    assert time.perf_counter() - began < 20


def template_rows(count: int) -> list[str]:
    """Rows of 200 sentences with another word in two places."""
    words, generator = vocabulary(11), random.Random(12)
    sentences = [generator.choices(words, k=10) for _ in range(200)]
    rows = []
    for _ in range(count):
        row = list(generator.choice(sentences))
        row[3], row[6] = generator.choices(words, k=2)
        rows.append(" ".join(row))
    return rows


def shuffled_rows(count: int) -> list[str]:
    """Rows of the words of 200 sentences, in any order: a count of words tells none apart."""
    sentences, generator = texts(200, 10), random.Random(13)
    rows = []
    for _ in range(count):
        row = generator.choice(sentences).split()
        generator.shuffle(row)
        rows.append(" ".join(row))
    return rows


@pytest.mark.parametrize("make", [template_rows, shuffled_rows])
def test_20000_rows_of_a_template_take_three_seconds_at_most(make: Any) -> None:
    digests = digest(*(PlainText(text, i) for i, text in enumerate(make(20_000))))
    began = time.process_time()
    match_texts(digests, np.zeros(len(digests), dtype=bool))
    assert time.process_time() - began < 3
    half = int(digests.records["prompt"][:10_000].sum() + digests.records["answer"][:10_000].sum())
    known = Digests(digests.records[:10_000], digests.words[:half])
    began = time.process_time()
    match_training_texts(Digests(digests.records[10_000:], digests.words[half:]), known)
    assert time.process_time() - began < 3


def bits(text: str) -> list[int]:
    return digest(PlainText(text, 0)).words.tolist()


def side(*rows: list[int]) -> TextBatch:
    words = np.zeros((max(map(len, rows)), len(rows)), dtype=np.uint32)
    for i, row in enumerate(rows):
        words[: len(row), i] = row
    return TextBatch(words, np.array([len(row) for row in rows]))


def plain_distance(a: list[int], b: list[int]) -> int:
    """The whole table of optimal string alignment, a slip at 1 and anything else at 2."""
    table = [[2 * (i + j) for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            step = 0 if a[i - 1] == b[j - 1] else 1 if is_typo(a[i - 1], b[j - 1]) else 2
            ways = [table[i - 1][j - 1] + step, table[i - 1][j] + 2, table[i][j - 1] + 2]
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                ways.append(table[i - 2][j - 2] + 2)
            table[i][j] = min(ways)
    return table[-1][-1]


def test_many_pairs_at_once_have_the_distances_of_single_ones() -> None:
    generator = random.Random(5)
    words = bits("house houses huose garden gadren tree 1904 a street")
    ones = [generator.choices(words, k=generator.randrange(0, 12)) for _ in range(3_000)]
    others = [generator.choices(words, k=generator.randrange(0, 12)) for _ in ones]
    for i in range(0, len(ones), 2):  # every other pair is nearly the same
        others[i] = list(ones[i])
        for _ in range(generator.randrange(4)):
            at = generator.randrange(len(others[i]) + 1)
            others[i][at : at + generator.randrange(3)] = generator.choices(words, k=1)
    want = np.array([plain_distance(a, b) for a, b in zip(ones, others, strict=True)])
    found = compute_edit_distances(side(*ones), side(*others))
    assert set(range(7)) <= set(want.tolist())
    assert found[want <= 6].tolist() == want[want <= 6].tolist()
    assert (found[want > 6] > 6).all()


@pytest.mark.parametrize(
    ("one", "other", "half_words"),
    [
        ("a b c d", "a b c d", 0),
        ("a b c d", "a x c d", 2),
        ("a b c d", "a c b d", 2),
        ("a b c d", "b c d", 2),
        ("a b c d", "a b c d e", 2),
        ("a parser reads", "a praser reads", 1),
        ("a parser reads", "a parsre raeds", 2),
        ("a bad man", "a bda man", 2),  # three letters are too few for a slip
        ("in 1904 there", "in 1905 there", 2),
    ],
)
def test_half_words(one: str, other: str, half_words: int) -> None:
    a, b = side(bits(one)), side(bits(other))
    assert compute_edit_distances(a, b).tolist() == [half_words]
    assert compute_edit_distances(b, a).tolist() == [half_words]


def test_slips() -> None:
    def slip(one: str, other: str) -> bool:
        return bool(is_typo(bits(one)[0], bits(other)[0]))

    assert slip("argument", "arguement")
    assert slip("received", "recieved")
    assert not slip("mother", "father")
    assert not slip("upwards", "leftwards")
    assert not slip("man", "men")
