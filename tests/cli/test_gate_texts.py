"""Data checks of texts, prompts, answers and labels in `train`, before weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from published_chat_templates import TEMPLATES
from run_files import ModelDir, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

SUBJECTS = "parser reader writer buffer cursor socket thread signal window palette".split()
VERBS = "returns closes opens flushes copies rotates compares paints locks sorts".split()
OBJECTS = "archive token header packet matrix ledger column ribbon lantern bridge".split()
LOCATIONS = "memory storage kernel garden office harbour village station library museum".split()


def make_sentence(i: int) -> str:
    """Return a twelve-word sentence that differs in most words between values of `i`."""
    words = (SUBJECTS[i % 10], VERBS[i // 10 % 10], OBJECTS[i * 3 % 10], LOCATIONS[i * 7 % 10])
    return "Every {}{} {} some {} number{} from the {} before it is noon".format(
        words[0], "s" * (i % 3), words[1], words[2], i, words[3]
    )


def pair(i: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"What does item{i} do?", "completion": make_sentence(i), **changes}


def make_chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


GOOD = [pair(i) for i in range(12)]
CHATS = [
    make_chat(("user", f"What does item{i} do?"), ("assistant", make_sentence(i)))
    for i in range(12)
]


@pytest.mark.parametrize(
    ("check", "title", "row"),
    [
        ("near_duplicates", "nearly the same as an earlier row",
         pair(3, prompt="What does the item3 do?")),
        ("conflicting_answers", "an earlier row's prompt with another answer",
         pair(3, completion="Nobody knows.")),
        ("lost_characters", "NUL or U+FFFD in a text", pair(20, completion="caf\ufffd is open")),
        ("html", "HTML in a text", pair(20, completion="One<br>two")),
        ("special_token_text", "the text of a special token in a prompt or an answer",
         pair(20, completion="It is <|im_end|> here")),
        ("answer_is_prompt", "an answer that is the prompt",
         pair(20, completion="What does item20 do?")),
        ("turn_order", "a conversation that begins with the assistant or does not end with it",
         make_chat(("assistant", make_sentence(20)), ("user", "What does item20 do?"))),
    ],
)  # fmt: skip
def test_each_check_reports_its_row(check: str, title: str, row: Any, cli: Cli) -> None:
    good = CHATS if "messages" in row else GOOD
    code, out = cli.dry_run(rows=[*good, row])
    assert code == 0, out
    duplicate_of = " as rows.jsonl:4" if check in ("near_duplicates", "conflicting_answers") else ""
    assert (
        f"data check: {title}: 1 of 13 train rows (rows.jsonl:13{duplicate_of}) "
        f"(kept; --set data.gate.{check}=stop|drop|ignore)"
    ) in out
    assert out.count("data check:") == 1
    code, out = cli.dry_run("--set", f"data.gate.{check}=drop", rows=[*good, row])
    assert "data: rows.jsonl (12 rows" in out
    code, out = cli.dry_run("--set", f"data.gate.{check}=stop", rows=[*good, row])
    assert code == 2


def test_near_duplicates_of_training_rows_are_dropped_from_validation(cli: Cli) -> None:
    Path("set").mkdir()
    write_rows("set/train.jsonl", GOOD)
    near_duplicate = pair(3, completion=make_sentence(3).replace("before", "until"))
    write_rows(
        "set/validation.jsonl", [pair(40), near_duplicate, pair(41), GOOD[5]]
    )  # the last is an exact copy
    write_rows("set/test.jsonl", [near_duplicate])
    code, out = cli.dry_run("--dataset", "set")
    assert code == 0, out
    assert (
        "nearly the same as a training row: 1 of 4 validation rows (set/validation.jsonl:2)" in out
    )
    assert "nearly the same as a training row: 1 of 1 test rows (set/test.jsonl:1) (kept" in out
    code, out = cli.dry_run("--dataset", "set", "--set", "data.gate.near_leaked=drop")
    assert "data: set (12 rows; 2 for validation)" in out


def test_constant_answer_is_reported(cli: Cli) -> None:
    _, out = cli.dry_run(rows=[pair(i, completion="Yes.") for i in range(12)])
    assert "one answer for nearly all rows: 12 of 12 train rows (that of rows.jsonl:1) (kept" in out


def test_supervised_empty_think_block_is_reported(tiny_model_dir: ModelDir, cli: Cli) -> None:
    Path("qwen3.jinja").write_text(TEMPLATES["qwen-3"], encoding="utf-8")
    model = ["--model", str(tiny_model_dir("qwen2")), "--chat-template"]
    code, out = cli.dry_run(*model, "qwen3.jinja", rows=GOOD)
    assert code == 0, out
    assert "a supervised empty <think></think>: 12 of 12 train rows (rows.jsonl:1" in out
    _, out = cli.dry_run(*model, "qwen", rows=GOOD)
    assert "<think>" not in out
    reasoning_rows = [
        pair(i, completion=f"<think>\nhm\n</think>\n\n{make_sentence(i)}") for i in range(12)
    ]
    _, out = cli.dry_run(*model, "qwen3.jinja", rows=reasoning_rows)
    assert "<think>" not in out


KTO = [pair(i, label=i % 3 != 0) for i in range(12)]
DPO = [
    {"prompt": f"q{i}", "chosen": make_sentence(i), "rejected": make_sentence(i + 50)}
    for i in range(6)
]


@pytest.mark.parametrize(
    ("rows", "message", "fix"),
    [
        (KTO, "rows.jsonl:1: 'label' is false in 4 of 12 rows: bad answers, as for --task "
         "preference --loss kto, which --task text-generation would learn as good ones. Remove "
         "these rows, or pass --format prompt-completion if 'label' says something else.",
         ["--format", "prompt-completion"]),
        (DPO, "columns 'chosen' and 'rejected' are for preference training, which --task "
              "text-generation does not support. Use --task preference, or train on the chosen "
              "answers only: --map prompt=prompt --map completion=chosen.",
         ["--map", "prompt=prompt", "--map", "completion=chosen"]),
    ],
)  # fmt: skip
def test_rejected_answers_are_not_trained_as_targets(
    rows: list[Any], message: str, fix: list[str], cli: Cli
) -> None:
    code, out = cli.dry_run(rows=rows)
    assert (code, out.splitlines()[-1]) == (2, f"ftlevel: {message}  [rows]")
    assert cli.dry_run(*fix, rows=rows)[0] == 0


def test_all_true_labels_are_accepted(cli: Cli) -> None:
    assert cli.dry_run(rows=[{**row, "label": True} for row in KTO])[0] == 0


LABELS = ["good", "bad"] * 10


def reviews(labels: list[str]) -> list[dict[str, Any]]:
    return [{"text": make_sentence(i), "label": label} for i, label in enumerate(labels)]


def test_labels_differing_by_space_or_case(tiny_model_dir: ModelDir, cli: Cli) -> None:
    bert = ["--task", "text-classification", "--model", str(tiny_model_dir("bert"))]
    code, out = cli.dry_run(*bert, rows=reviews([*LABELS, "good ", " bad"]))
    assert code == 0, out
    assert "labels: 2 (bad, good)" in out
    assert (
        "labels that differ by surrounding white space: 2 of 22 train rows (rows.jsonl:21: 'good ' "
        "is 'good', rows.jsonl:22: ' bad' is 'bad') (made one; --set "
        "data.gate.label_space=stop|warn|ignore)"
    ) in out
    rows = reviews([*LABELS, "Good", "BAD "])
    code, out = cli.dry_run(*bert, rows=rows)
    assert (code, out.splitlines()[-1]) == (
        2,
        "ftlevel: labels that differ by case: 2 of 22 train rows (rows.jsonl:21: 'Good' is 'good', "
        "rows.jsonl:22: 'BAD ' is 'bad'). Write them alike, or pass --set "
        "data.gate.label_case=fold or warn.  [rows]",
    )
    code, out = cli.dry_run(*bert, "--set", "data.gate.label_case=fold", rows=rows)
    assert (code, "labels: 2 (bad, good)" in out) == (0, True)
    code, out = cli.dry_run(*bert, "--set", "data.gate.label_case=warn", rows=rows)
    assert (code, "labels: 4 (" in out) == (0, True)


def test_misspelled_label_is_reported(tiny_model_dir: ModelDir, cli: Cli) -> None:
    bert = ["--task", "text-classification", "--model", str(tiny_model_dir("bert"))]
    rows = reviews([*["positive", "negative", "neutral"] * 10, "postive"])
    code, out = cli.dry_run(*bert, rows=rows)
    assert code == 0, out
    assert (
        "a rare label that looks like a misspelled frequent one: 1 of 31 train rows (rows.jsonl:31:"
        " 'postive' is 'positive') (kept; --set data.gate.label_typo=stop|fold|ignore)"
    ) in out
    assert "labels: 4 (" in out
    code, out = cli.dry_run(*bert, "--set", "data.gate.label_typo=fold", rows=rows)
    assert (code, "labels: 3 (" in out) == (0, True)
    code, out = cli.dry_run(*bert, "--set", "data.gate.label_typo=stop", rows=rows)
    assert (code, "pass --set data.gate.label_typo=fold or warn." in out) == (2, True)


def test_validation_labels_are_folded_to_training_labels(
    tiny_model_dir: ModelDir, cli: Cli
) -> None:
    bert = ["--task", "text-classification", "--model", str(tiny_model_dir("bert"))]
    Path("set").mkdir()
    write_rows("set/train.jsonl", reviews(LABELS))
    validation_rows = [
        {"text": make_sentence(i), "label": label} for i, label in enumerate(["bad", "good\n"], 50)
    ]
    write_rows("set/validation.jsonl", validation_rows)
    code, out = cli.dry_run(*bert, "--dataset", "set")
    assert code == 0, out
    assert (
        "surrounding white space: 1 of 2 validation rows (set/validation.jsonl:2: 'good\\n'" in out
    )
    write_rows(
        "set/validation.jsonl", [*validation_rows, {"text": make_sentence(60), "label": "Good"}]
    )
    code, out = cli.dry_run(*bert, "--dataset", "set")
    assert code == 2
    assert "They differ by case only: train with --set data.gate.label_case=fold." in out
    code, out = cli.dry_run(*bert, "--dataset", "set", "--set", "data.gate.label_case=fold")
    assert (code, "20 rows; 3 for validation" in out) == (0, True)


def test_long_validation_texts_are_split(cli: Cli) -> None:
    texts = [{"text": " ".join(make_sentence(k) for k in range(i, i + 5))} for i in range(0, 60, 5)]
    Path("set").mkdir()
    write_rows("set/train.jsonl", texts)
    write_rows(
        "set/validation.jsonl",
        [{"text": make_sentence(90)}, {"text": f"{make_sentence(91)} {make_sentence(95)} " * 4}],
    )
    code, out = cli.dry_run("--dataset", "set", "--max-length", "64", "--overlong", "split")
    assert code == 0, out
    assert "of validation dropped" not in out
    assert "rows changed: 1 of validation split into several" in out
    code, out = cli.dry_run("--dataset", "set", "--max-length", "64", "--overlong", "drop", "--set",
                        "data.gate.unsupervised=ignore")  # fmt: skip
    assert "no row is left" in out or "1 of validation dropped, beyond the max length" in out
