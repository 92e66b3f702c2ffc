"""Tests of preference data from columns to encoded rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlevel.config import DataConfig
from ftlevel.data.encoding.fit import LengthBounds, fit_rows
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import IGNORED, Encoded, RowError
from ftlevel.data.encoding.store import rows_to_batches, write_store
from ftlevel.data.formats.examples import convert_rows
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.extras.preference.config import PreferenceConfig
from ftlevel.extras.preference.formats import LabeledCompletion, PairExample
from ftlevel.extras.preference.rows import (
    ContrastedRows,
    LabeledAnswerRow,
    PairRow,
    PreferenceEncoder,
    check_answers,
    check_pairs,
    create_pair_row,
)
from ftlevel.tasks import TASKS

ModelDir = Callable[..., Path]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


_TURNS = [_user("Hi"), _assistant("Hello"), _user("2 + 2?")]
_HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?\n\nAssistant:"

FORMATS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "names of others": {"question": "2 + 2?", "chosen_response": "4", "rejected_response": "5"},
    "alpaca": {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    "old alpaca": {"instruction": "2 + 2?", "input": "", "output": ["4", "5"]},
    "system": {"system": "Be brief.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "chat": {"prompt": _TURNS, "chosen": [_assistant("4")], "rejected": [_assistant("5")]},
    "one turn each": {"messages": _TURNS, "chosen": _assistant("4"), "rejected": _assistant("5")},
    "implicit chat": {"chosen": [*_TURNS, _assistant("4")], "rejected": [*_TURNS, _assistant("5")]},
    "ultrafeedback": {
        "prompt": "2 + 2?",
        "chosen": [_user("2 + 2?"), _assistant("4")],
        "rejected": [_user("2 + 2?"), _assistant("5")],
        "messages": [_user("2 + 2?"), _assistant("4")],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
    "hh": {"chosen": f"{_HH} 4", "rejected": f"{_HH} 5"},
    "swift": {"messages": [*_TURNS, _assistant("4")], "rejected_response": "5"},
    "ranked": {"prompt": "2 + 2?", "answers": [{"answer": "5", "rank": 3},
               {"answer": "4", "rank": 1}, {"answer": "3", "rank": 2}]},
    "scored": {"instruction": "2 + 2?", "completions": [
        {"response": "5", "overall_score": 1}, {"response": "4", "overall_score": 8.5}]},
}  # fmt: skip


def _read(row: dict[str, Any], loss: str = "dpo") -> Any:
    task = TASKS["preference"].configured({"preference": {"loss": loss}})
    table = Table([row], [1], "rows.jsonl")
    format_ = task.get_format(list(row), DataConfig(), [row])
    examples, bad = convert_rows(table, format_)
    if bad:
        raise InputError(bad[0].message)
    return examples[0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_prompt_chosen_and_rejected(name: str) -> None:
    example = _read(FORMATS[name])
    assert isinstance(example, PairExample)
    assert example.prompt[-1].content == "2 + 2?"
    assert [turn.content for turn in example.chosen] == ["4"]
    assert [turn.content for turn in example.rejected] == ["5"]
    roles = [turn.role for turn in example.prompt]
    has_history = name in ("chat", "one turn each", "implicit chat", "hh", "swift")
    start = ["system"] if name == "system" else ["user", "assistant"] if has_history else []
    assert roles == [*start, "user"]


@pytest.mark.parametrize(
    ("good", "bad"),
    [("Hello there", "Hi"), ("The sky is blue", "The sky is blue and vast"), ("Paris ", "London")],
)
def test_implicit_prompt_ends_at_word_boundary(good: str, bad: str) -> None:
    example = _read({"chosen": f"{_HH} {good}", "rejected": f"{_HH} {bad}"})
    assert example.prompt[-1].content == "2 + 2?"
    assert [example.chosen[0].content, example.rejected[0].content] == [good.strip(), bad]


def test_answers_start_where_conversations_diverge() -> None:
    row = {
        "chosen": [_user("a"), _assistant("b"), _user("c"), _assistant("d")],
        "rejected": [_user("a"), _assistant("x"), _user("y"), _assistant("z")],
    }
    example = _read(row)
    assert [turn.content for turn in example.prompt] == ["a"]
    assert [turn.content for turn in example.chosen] == ["b", "c", "d"]


UNPAIRED = {
    "unpaired": {"prompt": "q", "completion": "a", "label": True},
    "as a number": {"prompt": "q", "completion": "a", "label": 1},
    "messages": {"messages": [_user("q"), _assistant("a")], "label": "true"},
    "llama-factory": {"messages": [_user("q"), _assistant("a")], "kto_tag": True},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_formats_are_read(name: str) -> None:
    example = _read(UNPAIRED[name], "kto")
    assert isinstance(example, LabeledCompletion)
    assert (example.prompt[0].content, example.answer[0].content) == ("q", "a")
    assert example.desirable


INVALID_ROWS = [
    ({"prompt": "q", "chosen": "a"}, "dpo", "no 'rejected'"),
    ({"prompt": "q", "rejected": "a"}, "dpo", "no 'chosen'"),
    (UNPAIRED["unpaired"], "dpo", "Use --loss kto"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "dpo", "is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "dpo", "is null"),
    ({"prompt": "q", "completion": "a", "label": 2}, "kto", "true or false"),
    ({"prompt": "q", "chosen": [_user("a")], "rejected": "b"}, "dpo", "no assistant turn"),
    ({"chosen": "a", "rejected": "b"}, "dpo", "no prompt"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, "dpo", "a number"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "dpo", "a number"),
    (
        {"prompt": "q", "answers": [{"answer": "a", "score": 10**400}, {"answer": "b", "rank": 2}]},
        "dpo",
        "without rank and score",
    ),
    (
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}]},
        "dpo",
        "has no pair of answers with a preference",
    ),
    (
        {"prompt": "q", "answers": [{"answer": "a", "rank": "first"}, {"answer": "b", "rank": 2}]},
        "dpo",
        "without rank and score",
    ),
]


@pytest.mark.parametrize(("row", "loss", "words"), INVALID_ROWS)
def test_invalid_preference_row_raises(row: dict[str, Any], loss: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        _read(row, loss)


def _encoder(path: Path, kind: str = "decoder") -> PreferenceEncoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    form = "chat-template" if tokenizer.chat_template else "plain"
    return PreferenceEncoder(tokenizer, PromptFormat(form), kind, False, False, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("chat", [True, False])
def test_labels_cover_answer_and_one_end_token(chat: bool, tiny_model_dir: ModelDir) -> None:
    encoder = _encoder(tiny_model_dir("llama", chat=chat))
    example = FORMATS["implicit chat" if chat else "explicit"]
    [row] = encoder([_read(example)])
    assert isinstance(row, PairRow)
    good, bad = row.sequences
    assert good.input_ids[: row.prompt] == bad.input_ids[: row.prompt]
    special_ids = set(encoder.tokenizer.all_special_ids)
    for sequence, text in ((good, "4"), (bad, "5")):
        labels = [label for label in sequence.labels if label != IGNORED]  # type: ignore[union-attr]
        assert sum(label in special_ids for label in labels) == 1
        assert labels[-1] in special_ids
        assert encoder.tokenizer.decode(labels[:-1]).strip() == text
    assert set(_labels(row)[: row.prompt]) == {IGNORED}


def _labels(row: Encoded) -> list[int]:
    assert isinstance(row.labels, list)
    return row.labels


def test_template_with_answer_dependent_prompt_raises(
    tiny_model_dir: ModelDir,
) -> None:
    encoder = _encoder(tiny_model_dir("llama", chat=True))
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 == 0 %}{{ messages[-1]['content'][:1] }} is the "
        "first letter. {% endif %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises((RowError, InputError), match=r"prompt|answers cannot be located"):
        encoder([_read(FORMATS["explicit"])])


def _row(prompt: int, chosen: int, rejected: int) -> PairRow:
    prompt_ids = list(range(10, 10 + prompt))
    rows = [Encoded(prompt_ids + [c] * n, [IGNORED] * prompt + [c] * n, 0)
            for c, n in ((3, chosen), (4, rejected))]  # fmt: skip
    return create_pair_row(*rows, prompt, 0.5, scored=False)


def test_long_pair_is_truncated_equally_or_dropped() -> None:
    rows = [_row(8, 3, 6), _row(2, 3, 20), _row(2, 1, 1)]
    assert [row.length for row in rows] == [14, 22, 3]
    where = str
    cut = fit_rows(rows, 10, LengthBounds(), "truncate-prompt", where)
    [first, last] = cut.rows
    assert isinstance(first, PairRow)
    good, bad = first.sequences
    assert good.input_ids[:4] == bad.input_ids[:4] == [10, 15, 16, 17]
    assert (len(good.input_ids), len(bad.input_ids)) == (7, 10)
    assert (last.length, cut.lost) == (3, (0,))
    assert len(fit_rows(rows, 10, LengthBounds(), "drop", where).rows) == 1
    with pytest.raises(InputError, match="longer than 10 tokens"):
        fit_rows(rows, 10, LengthBounds(), "error", where)


def test_rows_round_trip_through_file(tmp_path: Path) -> None:
    pairs = [_row(4, 2, 3), _row(5, 1, 2)]
    store = write_store(tmp_path / "rows.arrow", rows_to_batches(pairs))
    assert [repr(row) for row in store] == [repr(row) for row in pairs]  # nan is not itself
    assert store.lengths().tolist() == [7, 7]


def _labeled_row(prompt: int, answer: int) -> LabeledAnswerRow:
    return LabeledAnswerRow([prompt] * 3 + [answer], [IGNORED] * 3 + [answer], 0, {}, 3, 1, ())


def test_contrasts_come_from_other_prompts() -> None:
    rows = ContrastedRows(
        [_labeled_row(1, 11), _labeled_row(1, 12), _labeled_row(2, 21), _labeled_row(2, 22)], 99
    )
    contrasts = [row.contrasts[0].input_ids for row in rows]
    assert contrasts == [[1, 1, 1, 22], [1, 1, 1, 22], [2, 2, 2, 12], [2, 2, 2, 12]]


def test_equal_and_contradicting_pairs_are_detected() -> None:
    pair = _row(4, 2, 3)
    ids, labels = pair.input_ids, _labels(pair)
    reversed_pair = PairRow(
        ids[:4] + ids[6:] + ids[4:6], labels[:4] + labels[6:] + labels[4:6], 1, {}, 4, 3
    )
    same = PairRow([1, 2, 3, 3], [IGNORED, IGNORED, 3, 3], 2, {}, 2, 1)
    checks = check_pairs([pair, reversed_pair, same])
    assert checks["equal_answers"].tolist() == [False, False, True]
    assert checks["contradicting_pairs"].tolist() == [False, True, False]


def _examples(count: int, chosen: str, rejected: str, **more: Any) -> list[PairExample]:
    row = {"prompt": "what is this here", "chosen": chosen, "rejected": rejected, **more}
    return [_read(row)] * count


@pytest.mark.parametrize(
    ("examples", "check"),
    [
        (_examples(30, "long and longer still", "short"), "length_bias"),
        (_examples(30, "short", "long and longer still"), "length_bias"),
        (_examples(3, "good", "evil", score_chosen=1, score_rejected=2), "scores_disagree"),
        (_examples(3, "what is this here? it is", "evil"), "prompt_in_answer"),
        ([_read(UNPAIRED["unpaired"], "kto")] * 3, "one_verdict"),
    ],
)
def test_data_problems_are_detected(examples: Any, check: str) -> None:
    assert [found[0] for found in check_answers(examples, "kto")] == [check]


def test_good_data_has_no_problems() -> None:
    both = _examples(15, "good one", "bad") + _examples(15, "fine", "much worse")
    assert check_answers(both, "dpo") == []
    assert PreferenceConfig(loss="kto").loss_properties.paired is False
    assert np.isnan(PairRow([1], [1], 0).reference).all()
