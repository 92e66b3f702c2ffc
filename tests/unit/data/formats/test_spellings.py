"""Detection of misspelled labels."""

from __future__ import annotations

import pytest

from ftlevel.data.formats.examples import LabeledText, TaggedTokens
from ftlevel.data.formats.labels import get_label_typos


def make_examples(*labels: str | tuple[str, ...]) -> list[LabeledText]:
    return [LabeledText(f"text {i}", None, label, i) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("typo", "name"),
    [
        ("postive", "positive"), ("posative", "positive"), ("psoitive", "positive"),
        ("possitive", "positive"), ("positiv", "positive"), ("Postive", "positive"),
        ("not spam", "not_spam"), ("notspam", "not-spam"), ("B-PERSN", "B-PERSON"),
        ("very postive", "very positive"),
    ],
)  # fmt: skip
def test_typo_in_rare_label_is_found(typo, name):
    typos = get_label_typos(make_examples(*[name] * 10, typo, *["negative"] * 10, "neutral"))
    assert [(v.label, v.name, v.rows) for v in typos] == [(typo, name, (10,))]
    assert not get_label_typos(make_examples(*[name] * 4, typo))  # not rare


@pytest.mark.parametrize(
    "labels",
    [
        ("label1", "label2"), ("label_10", "label_11"), ("1 star", "2 stars"), ("pos", "neg"),
        ("B-PERSON", "I-PERSON"), ("B-PER", "I-PER"), ("class_a", "class_b"), ("typeA", "typeB"),
        ("typical", "atypical"), ("moral", "amoral"), ("PRON", "PROPN"), ("NNP", "NNPS"),
        ("ham", "spam"), ("male", "female"), ("known", "unknown"), ("grade IV", "grade V"),
        ("C", "C++"), ("en", "es"), ("Iran", "Iraq"), ("Gambia", "Zambia"),
        ("entailment", "contradiction"), ("toxic", "non-toxic"), ("like", "dislike"),
        ("Austria", "Australia"), ("2023-01", "2023-02"), ("covid19", "covid20"),
    ],
)  # fmt: skip
def test_similar_labels_are_not_typos(labels):
    for rare, often in (labels, labels[::-1]):
        assert not get_label_typos(make_examples(*[often] * 40, rare))


def test_typos_in_multi_labels_and_tags():
    examples = make_examples(*[("positive", "angry")] * 6, ("postive", "angry"))
    assert [(v.label, v.rows) for v in get_label_typos(examples)] == [("postive", (6,))]
    words = [TaggedTokens(("Ada", "x"), ("B-PERSON", "O"), i) for i in range(8)]
    words.append(TaggedTokens(("Ada", "x"), ("B-PRESON", "O"), 8))
    assert [(v.label, v.name) for v in get_label_typos(words)] == [("B-PRESON", "B-PERSON")]
    rare = make_examples(*["positive"] * 9, "positives")
    assert get_label_typos(rare)
    assert not get_label_typos(rare, ("positive", "positives"))
    assert [v.name for v in get_label_typos(make_examples("postive"), ("positive",))] == [
        "positive"
    ]
