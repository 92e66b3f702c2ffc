from __future__ import annotations

import pytest

from ftlevel.tasks import TASKS
from ftlevel.tasks.text import name_languages, score_rouge, score_translations


def test_perfect_translation_scores_100():
    texts = ["the cat sat on the mat", "a dog barked at the moon"]
    assert score_translations(texts, texts) == pytest.approx({"chrf": 100.0, "bleu": 100.0})


def test_translation_scores_by_hand():
    # Precisions 4/5, 3/4, 2/3 and 1/2; no brevity penalty.
    bleu = score_translations(["a b c d e"], ["a b c d f"])["bleu"]
    assert bleu == pytest.approx(100 * 0.2**0.25)
    # Character 1-grams and 2-grams: precision 1 and 1, recall 2/3 and 1/2; beta is 2.
    recall = (2 / 3 + 1 / 2) / 2
    chrf = score_translations(["ab"], ["abc"])["chrf"]
    assert chrf == pytest.approx(100 * 5 * recall / (4 + recall))


def test_bleu_tokenizes_chinese():
    predicted, expected = ["我喜欢红色的苹果"], ["我喜欢绿色的苹果"]
    assert score_translations(predicted, expected, "zh")["bleu"] > 20
    assert score_translations(predicted, expected)["bleu"] < 1


def test_rouge_scores_by_hand():
    scores = score_rouge(["the cat"], ["the cat sat"])
    assert scores["rouge1"] == pytest.approx(0.8)
    assert scores["rouge2"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        ("Кошка спит на солнце", "кошка, спит дома сегодня"),
        ("बिल्ली धूप में सोती", "बिल्ली धूप घर आज"),
        ("猫在睡觉", "猫在吃饭"),
    ],
)
def test_rouge_of_other_scripts(reference, prediction):
    """Two of four words, or Chinese characters, are equal, and one of three pairs."""
    scores = score_rouge([prediction], [reference])
    assert scores == pytest.approx({"rouge1": 1 / 2, "rouge2": 1 / 3, "rougeL": 1 / 2})


def test_rouge_of_ascii_references_is_that_of_the_library():
    from rouge_score.rouge_scorer import RougeScorer

    reference, prediction = "The cafés were closing, naïvely", "The cafe was closed naively"
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = {n: s.fmeasure for n, s in scorer.score(reference, prediction).items()}
    assert score_rouge([prediction], [reference]) == expected


def test_translation_instruction_names_languages():
    assert name_languages("decoder", "English", "German") == "Translate from English to German."
    assert name_languages("encoder-decoder", "English", "German") == "translate English to German:"


def test_every_task_defines_consistent_classes_and_scores():
    for task in TASKS.values():
        assert set(task.peft_types) <= set(task.auto_classes)
        assert (task.score_texts is not None) == task.generates_text
