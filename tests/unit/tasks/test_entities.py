from __future__ import annotations

import random

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from ftlevel.tasks.tags import are_entity_tags, extract_entities, name_scheme, score_entities


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O B-PER I-PER O B-LOC", [("PER", 1, 2), ("LOC", 4, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-PER I-PER E-PER S-LOC", [("PER", 0, 2), ("LOC", 3, 3)]),
        ("O O", []),
    ],
)
def test_extract_entities(tags, entities):
    assert extract_entities(tags.split()) == entities


def test_entity_scores_match_seqeval():
    generator = random.Random(3)
    for prefixes in ("BI", "BIES"):
        names = ["O", "O", *(f"{p}-{kind}" for p in prefixes for kind in ("A", "B"))]

        def draw_tags(names: list[str] = names) -> list[list[str]]:
            return [[generator.choice(names) for _ in range(length)] for length in range(1, 40)]

        true, predicted = draw_tags(), draw_tags()
        assert [extract_entities(tags) for tags in true] == [get_entities(tags) for tags in true]
        assert score_entities(true, predicted) == pytest.approx(
            {
                "precision": precision_score(true, predicted),
                "recall": recall_score(true, predicted),
                "f1": f1_score(true, predicted),
            }
        )


def test_entity_scores_without_entities_are_zero():
    assert score_entities([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_are_entity_tags():
    assert are_entity_tags(["O", "B-PER", "I-PER"])
    assert not are_entity_tags(["NOUN", "VERB"])
    assert not are_entity_tags(["O"])
    assert not are_entity_tags(["0", "1"])


@pytest.mark.parametrize(
    ("sentences", "name"),
    [
        (["I-PER I-PER O", "B-LOC I-LOC"], "IOB2"),
        (["I-PER B-PER O", "I-LOC I-LOC"], "IOB1"),
        (["I-PER I-PER O"], "IO"),
        (["B-PER I-PER E-PER O S-LOC"], "IOBES"),
        (["B-PER I-PER L-PER O U-LOC"], "BILOU"),
    ],
)
def test_name_scheme_detects_tagging_scheme(sentences, name):
    assert name_scheme(sentence.split() for sentence in sentences) == name
