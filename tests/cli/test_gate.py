"""The data checks of `train`: findings are reported with their rows and handled by policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.config import GateConfig
from run_files import ModelDir, read_summary, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

WORDS = "argument parser module string value object file name path line".split()
TEMPLATE_WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sentence(i: int, length: int = 12) -> str:
    return " ".join(WORDS[(i * (k + 3) + k * k) % 10] + str(i * k % 7) for k in range(length))


def pair(i: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"say {sentence(i)}", "completion": sentence(i + 50), **changes}


GOOD = [pair(i) for i in range(6)]


CHAT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FIX = "Fix the line, or drop bad rows with --on-bad-row skip."


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("null_content", pair(9, completion=None), "'completion' is null"),
        ("empty_text", pair(9, prompt=" "), "'prompt' is empty"),
        ("unknown_role", None, "turn 1 of 'messages' has the unknown role 'userr' "
         "(did you mean 'user'?; or map it: --map user=userr, or assistant=…)"),
    ],
)  # fmt: skip
def test_unusable_rows_stop_or_are_dropped(name: str, row: Any, reason: str, cli: Cli) -> None:
    rows = [*GOOD, row]
    if name == "unknown_role":
        bad = {"messages": [{**CHAT[0], "role": "userr"}, CHAT[1]]}
        rows = [{"messages": [{**CHAT[0], "content": f"q{i}"}, CHAT[1]]} for i in range(6)] + [bad]
    code, out = cli.dry_run(rows=rows)
    assert (code, out.splitlines()[-1]) == (2, f"ftlevel: rows.jsonl:7: {reason}. {FIX}  [rows]")
    code, out = cli.dry_run("--set", f"data.gate.{name}=drop", rows=rows)
    assert code == 0, out
    assert (
        f"1 of 7 train rows (rows.jsonl:7: {reason}) (dropped; --set data.gate.{name}=stop" in out
    )


def test_duplicates_are_counted_and_dropped_by_policy(cli: Cli) -> None:
    longer = pair(20, completion=sentence(90, 60))
    near_duplicate = {**longer, "completion": longer["completion"] + " end"}
    rows = [*GOOD, {"prompt": GOOD[1]["prompt"].upper(), "completion": GOOD[1]["completion"]},
            longer, near_duplicate]  # fmt: skip
    code, out = cli.dry_run(rows=rows)
    assert code == 0
    assert (
        "data check: the same as an earlier row: 1 of 9 train rows (rows.jsonl:7 as rows.jsonl:2) "
        "(kept; --set data.gate.exact_duplicates=stop|drop|ignore)"
    ) in out
    assert (
        "data check: nearly the same as an earlier row: 1 of 9 train rows "
        "(rows.jsonl:9 as rows.jsonl:8)"
    ) in out
    settings = ["data.gate.exact_duplicates=drop", "data.gate.near_duplicates=drop"]
    code, out = cli.dry_run(*(x for s in settings for x in ("--set", s)), rows=rows)
    assert "data: rows.jsonl (7 rows" in out
    code, out = cli.dry_run("--set", "data.gate.exact_duplicates=stop", rows=rows)
    assert (code, out.splitlines()[-1]) == (
        2,
        "ftlevel: the same as an earlier row: 1 of 9 train rows (rows.jsonl:7 as rows.jsonl:2). "
        "Remove them, or pass --set data.gate.exact_duplicates=drop or warn.  [rows]",
    )


def test_leaked_validation_rows_are_dropped(cli: Cli) -> None:
    Path("set").mkdir()
    write_rows("set/train.jsonl", GOOD)
    write_rows("set/validation.jsonl", [GOOD[2], pair(30), pair(31)])
    write_rows("set/test.jsonl", [pair(40), GOOD[0]])
    code, out = cli.dry_run("--dataset", "set")
    assert code == 0
    assert "data: set (6 rows; 2 for validation)" in out
    assert "also a training row: 1 of 3 validation rows (set/validation.jsonl:1) (dropped;" in out
    assert "also a training row: 1 of 2 test rows (set/test.jsonl:2) (kept;" in out
    code, out = cli.dry_run("--dataset", "set", "--set", "data.gate.leaked=stop")
    assert code == 2
    assert out.count("also a training row") == 2
    write_rows("set/validation.jsonl", [GOOD[2]])
    code, out = cli.dry_run("--dataset", "set")
    assert "data: set (6 rows; every validation row was dropped)" in out


def test_template_without_end_of_turn_is_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    import shutil

    shutil.copytree(tiny_model_dir("llama"), "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE_WITHOUT_END, encoding="utf-8")
    code, out = cli.dry_run("--model", "model", rows=GOOD)
    assert code == 2
    assert (
        "ftlevel: an answer without EOS or an end of turn among its labels: 6 of 6 train rows "
        "(rows.jsonl:1, rows.jsonl:2, rows.jsonl:3 and 3 more). The model would not learn to stop"
    ) in out


PARTIAL_GENERATION_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if 'it' in m['content'] %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("num_supervised", [0, 2])
def test_unsupervised_rows_are_dropped_or_stop(
    num_supervised: int, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    Path("own.jinja").write_text(PARTIAL_GENERATION_TEMPLATE, encoding="utf-8")
    rows = [pair(i, completion="it " * (i < num_supervised) + sentence(i + 50)) for i in range(6)]
    model = ["--model", str(tiny_model_dir("qwen2")), "--chat-template", "own.jinja"]
    code, out = cli.dry_run(*model, rows=rows)
    if not num_supervised:
        assert (code, out.splitlines()[-1]) == (
            2,
            "ftlevel: every train row was dropped: no supervised token: 6 of 6 train rows "
            "(rows.jsonl:1, rows.jsonl:2, rows.jsonl:3 and 3 more). Correct them.  [rows]",
        )
        return
    assert code == 0, out
    assert "no supervised token: 4 of 6 train rows (rows.jsonl:3, rows.jsonl:4, rows.jsonl:5" in out
    assert "data: rows.jsonl (2 rows" in out
    code, out = cli.dry_run(*model, "--set", "data.gate.unsupervised=stop", rows=rows)
    assert code == 2


def test_text_with_bos_gets_no_second_bos(tiny_model_dir: ModelDir, cli: Cli) -> None:
    rows = [{"text": f"<s>{sentence(i)}"} for i in range(4)]
    code, out = cli.dry_run("--model", str(tiny_model_dir("llama")), rows=rows)
    assert code == 0
    assert "two BOS" not in out


def test_class_imbalance_is_reported(tiny_model_dir: ModelDir, cli: Cli) -> None:
    rows = [{"text": sentence(i), "label": "b" if i == 5 else "a"} for i in range(40)]
    code, out = cli.dry_run(
        "--task", "text-classification", "--model", str(tiny_model_dir("bert")), rows=rows
    )
    assert code == 0
    assert "one class has nearly all rows: 39 of 40 train rows (label 'a' and 38 more)" not in out
    assert "one class has nearly all rows: 39 of 40 train rows (label 'a')" in out


def test_token_ids_beyond_embedding_are_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    model = tiny_model_dir("llama", vocab_size=300)
    code, out = cli.dry_run("--model", str(model), rows=GOOD)
    assert code == 2
    assert "a token id beyond the model's embedding: 6 of 6 train rows (rows.jsonl:1" in out
    assert "The tokenizer is not this model's: use its own, or pass" in out


def test_long_prompts_are_reported(cli: Cli) -> None:
    rows = [*GOOD, pair(9, prompt=sentence(3, 200))]
    code, out = cli.dry_run("--max-length", "300", "--overlong", "truncate-prompt", rows=rows)
    assert code == 0, out
    assert "a prompt that alone exceeds the max length: 1 of 7 train rows (rows.jsonl:7)" in out
    assert "rows changed: 1 shortened at the beginning of the prompt" in out


def test_dropped_row_is_not_reported_as_kept(cli: Cli) -> None:
    long = pair(9, prompt=sentence(3, 200), completion="one<br>two")
    rows = [*GOOD, long, long]
    code, out = cli.dry_run("--max-length", "300", "--overlong", "drop", rows=rows)
    assert code == 0, out
    assert "rows changed: 2 dropped" in out
    checks = [line.partition("data check: ")[2] for line in out.splitlines()]
    assert list(filter(None, checks)) == [
        "a prompt that alone exceeds the max length: 2 of 8 train rows "
        "(rows.jsonl:7, rows.jsonl:8) (dropped; --set data.gate.long_prompt=stop|warn|ignore)"
    ]


@pytest.mark.parametrize("policy", ["warn", "drop"])
def test_truncated_answer_is_dropped_by_every_policy(policy: str, cli: Cli) -> None:
    rows = [*GOOD, pair(9, completion=sentence(3, 200)), pair(10, prompt=sentence(3, 200))]
    truncation = ("--max-length", "300", "--overlong", "truncate-prompt")
    code, out = cli.dry_run(*truncation, "--set", f"data.gate.answer_cut={policy}", rows=rows)
    assert code == 0, out
    assert "an answer that does not fit whole: 1 of 8 train rows (rows.jsonl:7) (dropped;" in out
    assert (
        "a prompt that alone exceeds the max length: 1 of 8 train rows (rows.jsonl:8) (kept;" in out
    )


def test_auto_max_length_drops_up_to_one_percent(tiny_model_dir: ModelDir, cli: Cli) -> None:
    model = ["--model", str(tiny_model_dir("llama", max_position_embeddings=400))]
    rows = [pair(i) for i in range(149)] + [pair(200, prompt=sentence(3, 200))]
    code, out = cli.dry_run(*model, rows=rows)
    assert code == 0, out
    assert "max length: 400 tokens (auto: the model's positions; 1 row is longer, up to " in out
    assert "rows changed: 1 dropped" in out
    code, out = cli.dry_run(*model, "--max-length", "400", rows=rows)
    assert code == 2
    assert "1 of 150 rows are longer than 400 tokens; the longest has " in out
    assert "(rows.jsonl:150). Pass --overlong drop or truncate-prompt." in out
    assert run(["train", "--quiet", *model, "--dataset", "rows.jsonl", "--max-steps", "2",
                "--save-steps", "1", "--output-dir", "run"]) == 0  # fmt: skip
    assert read_summary()["data"]["dropped"] == 1
    assert run(["train", "--quiet", "--output-dir", "run", "--resume"]) == 0


def test_findings_appear_in_json_summary(cli: Cli) -> None:
    write_rows("rows.jsonl", [*GOOD, GOOD[0]])
    [finding] = cli.json("train --dry-run --json --dataset rows.jsonl")["data"]["gate"]
    assert finding == {
        "name": "exact_duplicates", "split": "train", "count": 1, "total": 7, "action": "warn",
        "places": ["rows.jsonl:7 as rows.jsonl:1"], "title": "the same as an earlier row",
    }  # fmt: skip


def test_invalid_check_action_is_rejected(cli: Cli) -> None:
    code, out = cli.dry_run("--set", "data.gate.null_content=warn")
    assert code == 2
    assert "--set data.gate.null_content: 'warn' is not known. Expected one of stop, drop." in out
    code, out = cli.dry_run("--set", "data.gate.dups=warn")
    assert "unknown key 'data.gate.dups'" in out


def test_every_check_has_title_and_stop_suggests_fix() -> None:
    from ftlevel.config.gate import CHECKS
    from ftlevel.data.gate import Finding, explain_stop

    assert set(CHECKS) == set(GateConfig.model_fields)
    for name, check in CHECKS.items():
        assert check.title
        message = explain_stop(Finding(name, "train", 1, 2, ("a:1",), "stop"))
        assert "drop" in message or "warn" in message


def test_mixing_several_datasets(cli: Cli) -> None:
    write_rows("a.jsonl", GOOD)
    write_rows("b.jsonl", [pair(60 + i) for i in range(20)])
    datasets = ["--dataset", "a.jsonl", "--dataset", "b.jsonl"]
    code, out = cli.dry_run(*datasets)
    assert (code, "data: a.jsonl + b.jsonl (26 rows" in out) == (0, True)
    code, out = cli.dry_run(*datasets, "--mix", "1,2")
    assert "data: a.jsonl + b.jsonl (18 rows" in out
    assert "note: mixed 1 : 2: 6 of 6 rows of a.jsonl, 12 of 20 rows of b.jsonl" in out
    code, out = cli.dry_run(*datasets, "--mix", "1")
    assert (code, out.splitlines()[-1]) == (
        2,
        "ftlevel: --mix has 1 share for 2 data sets. Give one share for each --dataset.  "
        "[settings]",
    )
    write_rows("b.jsonl", [pair(60), pair(61, completion=None)])
    code, out = cli.dry_run(*datasets)
    assert "b.jsonl:2: 'completion' is null" in out


def test_docs_list_every_check_with_default() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    for name, info in GateConfig.model_fields.items():
        alternatives = [action for action in get_args(info.annotation) if action != info.default]
        line = f"| `{name}` | {info.description} | {info.default} | {', '.join(alternatives)} |"
        assert line in page, name


def test_test_split_without_label_is_not_compared(tiny_model_dir: ModelDir, cli: Cli) -> None:
    rows = [{"text": sentence(i), "label": "ab"[i % 2]} for i in range(8)]
    Path("set").mkdir()
    write_rows("set/train.jsonl", rows)
    write_rows("set/test.jsonl", [{"text": row["text"]} for row in rows])
    code, output = cli.dry_run(
        "--model", str(tiny_model_dir("bert")), "--dataset", "set", "--method", "lora",
        "--task", "text-classification",
    )  # fmt: skip
    assert code == 0, output
    text = " ".join(output.split())
    assert "set/test.jsonl: has no column 'label', so its rows are not compared with" in text
