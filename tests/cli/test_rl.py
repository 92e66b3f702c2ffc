"""Arguments that `train --task rl` rejects before weights load: one line, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run
from ftlevel.errors import ConfigError
from ftlevel.tasks import TASKS

DryRun = Callable[..., tuple[int, str]]

ROWS = [
    {"question": f"What is {i} + 2?", "answer": f"{i} + 2 is #### {i + 2}", "level": i}
    for i in range(8)
]
REWARDS = """
def of_level(completions, level, **kwargs):
    return [0.0] * len(completions)

def of_grade(completions, grade, **kwargs):
    return [0.0] * len(completions)
"""


@pytest.fixture
def dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> DryRun:
    """Return a function that runs `ftlevel train --task rl --dry-run`: exit code and output."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARDS, encoding="utf-8")

    def run_train(*arguments: str, rows: list[Any] = ROWS) -> tuple[int, str]:
        lines = "\n".join(json.dumps(row) for row in rows)
        Path("rows.jsonl").write_text(lines, encoding="utf-8")
        command = ["train", "--task", "rl", "--dataset", "rows.jsonl", "--dry-run"]
        code = run([*command, *arguments])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run_train


def error_lines(out: str) -> list[str]:
    """Return the error lines of an output."""
    return [line for line in out.splitlines() if line.startswith("ftlevel: ")]


SETTINGS = [
    ([], "--task rl has no reward. Add --reward exact, or another built-in one (contains, number"),
    (["--num-generations", "1"], "--loss dapo: a completion is compared with the others of its"),
    (["--num-generations", "0"], "--num-generations: 0 is out of range"),
    (["--temperature", "0"], "--temperature: 0.0 is out of range"),
    (["--top-p", "0.9"], "--task rl: it would sample from another distribution"),
    (["--top-k", "50"], "it would sample from another distribution"),
    (["--lora-dropout", "0.1"], "--lora-dropout 0.1 cannot be used with --task rl: the model that"),
    (["--neftune-noise-alpha", "5"], "--neftune-noise-alpha 5 cannot be used with --task rl"),
    (["--label-smoothing", "0.1"], "cannot be used with --task rl: it has no target tokens"),
    (["--lr-scheduler", "reduce_lr_on_plateau"], "--task rl: it has no validation loss"),
    (["--train-on-inputs"], "--task rl: it trains on sampled completions only"),
    (["--spike-factor", "3"], "--task rl: its loss is near 0 and may be negative"),
    (
        ["--max-completion-length", "1024"],
        "--max-completion-length 1,024 leaves no room for a prompt: the model has 1,024 positions",
    ),
    (["--shard", "full"], "--shard full cannot be used with --task rl: each process samples its"),
    (["--loss", "dappo"], "Did you mean 'dapo'"),
    (["--loss", "dpo"], "'dpo' is not known. Expected one of dapo, grpo, dr_grpo, bnpo, rloo"),
    (["--loss", "cispo", "--epsilon", "0.1"], "--epsilon has no effect with --loss cispo"),
    (
        ["--loss", "reinforce++", "--dynamic-sampling", "4"],
        "--dynamic-sampling 4 has no effect with --loss reinforce++: it compares completions",
    ),
    (["--loss", "rloo", "--scale-rewards", "batch"], "--scale-rewards has no effect with"),
    (["--loss", "reinforce++", "--scale-rewards", "group"], "no effect with --loss reinforce++"),
    (["--use-bias-correction-kl"], "--use-bias-correction-kl needs --beta N. Add --beta N, or"),
    (["--loss", "dapo", "--importance-sampling-level", "sequence"], "is --loss gspo"),
    (["--reward-weights", "1"], "weights belong to --reward. Write --reward NAME=WEIGHT"),
    (["--reward", "length:9"], "length:9: expected a range of tokens, as in length:20-80"),
    (
        ["--reward", "regex:("],
        "ftlevel: --reward: regex:(: expected a regular expression; missing )",
    ),
    (["--reward", "repetition:0"], "repetition:0: expected a number of words, as in repetition:3"),
    (["--reward", "exact=0"], "--reward: all weights are 0, so nothing can be learned."),
    (["--reward", "exact", "--reward", "exact=2"], "--reward: exact is given twice."),
    (["--reward", "rewards.py"], "'rewards.py' names no function. Write rewards.py:FUNCTION"),
    (
        ["--rollouts", "http://127.0.0.1:9", "--set", "method.modules_to_save=[lm_head]"],
        "--modules-to-save lm_head: a vLLM server loads plain LoRA adapters only.",
    ),
    (
        ["--rollouts", "localhost:8000"],
        "localhost:8000 is not an address without a password, such as http://",
    ),
    (
        ["--rollouts", "http:///v1"],
        "http:///v1 is not an address without a password, such as http://127.0.0.1:8000.",
    ),
    (
        ["--rollouts", "httpx://host"],
        "httpx://host is not an address without a password, such as http://",
    ),
    (["--sft-weight", "2"], "--sft-weight has no effect with --task rl: it is for --task pref"),
]


@pytest.mark.parametrize(("arguments", "message"), SETTINGS)
def test_invalid_settings_are_rejected(arguments: list[str], message: str, dry_run: DryRun) -> None:
    is_about_reward = not arguments or arguments[0] == "--reward"
    reward = [] if is_about_reward else ["--reward", "exact"]
    code, out = dry_run(*reward, *arguments)
    assert code == 2
    assert message in out
    assert len(error_lines(out)) == 1


def test_rl_settings_of_another_task_are_rejected(dry_run: DryRun) -> None:
    code, out = dry_run("--task", "text-generation", "--num-generations", "4", "--reward", "exact")
    assert code == 2
    assert "--reward has no effect with --task text-generation: it is for --task rl." in out


def drop_column(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in ROWS]


REWARD_FILES = [
    (["rewards.py:nothing"], ROWS, "rewards.py has no function 'nothing'. It has of_level"),
    (["none.py:f"], ROWS, "--reward none.py:f: none.py does not exist"),
    (
        ["rewards.py:of_grade"],
        ROWS,
        "needs a column 'grade', and the rows have question, answer, level",
    ),
    (["exact"], drop_column("answer"), "--reward exact needs a column 'answer'"),
    (["exactly"], ROWS, "no built-in reward, run or model has that name. Did you mean"),
    (["exact = 2"], ROWS, "no built-in reward, run or model has that name. Did you mean"),
    (["runs/none"], ROWS, "--reward runs/none does not exist"),
    (["builtin:tiny-llama"], ROWS, "was trained for text-generation, and a reward model has one"),
    (["json:none.json"], ROWS, "none.json cannot be read"),
    (
        ["number"],
        [*ROWS, {"question": "And?", "answer": "#### six", "level": 1}],
        "rows.jsonl:9: --reward number: the answer '#### six' has no number.",
    ),
    (
        ["choice"],
        ROWS,
        "rows.jsonl:1: --reward choice: the answer '0 + 2 is #### 2' is not one of A, B",
    ),
    (["exact"], [*ROWS, {"question": "  ", "answer": "1", "level": 1}], "rows.jsonl:9"),
    (
        ["length:1-9"],
        [{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I"}]}],
        "rows.jsonl:1: does not end with a turn to answer.",
    ),
    (["exact"], [{"text": "a b c"}] * 4, "no format matches the columns"),
]


@pytest.mark.parametrize(("reward", "rows", "message"), REWARD_FILES)
def test_invalid_rewards_and_rows_are_rejected(
    reward: list[str], rows: list[Any], message: str, dry_run: DryRun
) -> None:
    code, out = dry_run("--reward", *reward, rows=rows)
    assert code == 2
    assert message in out
    assert len(error_lines(out)) == 1


def test_validation_row_without_number_is_rejected(dry_run: DryRun) -> None:
    rows = [ROWS[0], {"question": "And?", "answer": "six", "level": 1}]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = dry_run("--reward", "number", "--validation-file", "held.jsonl")
    assert code == 2
    assert "held.jsonl:2: --reward number: the answer 'six' has no number." in out


def test_models_other_than_decoders_raise() -> None:
    with pytest.raises(ConfigError, match="Its source and its completions have no common sequence"):
        TASKS["rl"].auto_class("encoder-decoder", "t5")
    with pytest.raises(ConfigError, match=r"Use a decoder such as Llama\."):
        TASKS["rl"].auto_class("encoder", "bert")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--reward", "exact"], "loss: dapo (clip -0.2 +0.28"),
        (
            ["--reward", "exact", "--reward", "rewards.py:of_level=0.2"],
            "reward: exact, of_level (weight 0.2)",
        ),
        (["--reward", "exact=2", "--loss", "cispo"], "loss: cispo (ratio at most 5"),
        (["--task", "grpo", "--reward", "number"], "loss: grpo (clip -0.2 +0.2"),
        (["--task", "rloo", "--reward", "number"], "loss: rloo (clip -0.2 +0.2, advantages not"),
        (["--reward", "rewards.py:of_level", "--loss", "gspo"], "loss: gspo (clip -0.0003 +0.0004"),
        (["--reward", "regex:\\d", "--temperature", "0.7"], "temperature 0.7"),
        (["--reward", "exact", "--max-new-tokens", "32"], "8 completions of at most 32 tokens"),
    ],
)
def test_valid_settings_are_accepted(arguments: list[str], line: str, dry_run: DryRun) -> None:
    code, out = dry_run(*arguments)
    assert code == 0, out
    assert line in out
    assert "0.1 times the supervised rate" in out


def test_trl_batch_size_counts_completions(dry_run: DryRun) -> None:
    trl = ("--reward_funcs", "rewards.py:of_level", "--loss_type", "grpo", "--num_generations", "4")
    code, out = dry_run(*trl, "--per_device_train_batch_size", "6")
    assert code == 2
    assert "TRL counts completions, and a batch of 6 × 1 is not a multiple of it" in out
    code, out = dry_run(*trl, "--per_device_train_batch_size", "8", "--epsilon", "0.25")
    assert code == 0
    assert "batch of 2 prompts with 4 completions each: TRL counts 8 completions" in out
    code, out = dry_run("--reward_funcs", "rewards.py:of_level", "--task", "rloo")
    assert code == 0
    assert "--num-generations 2 is kept, as in TRL: its default" in out
    assert "--beta 0.05 is kept, as in TRL: its default" in out
    assert "batch of 4 prompts with 2 completions each: TRL counts 8 completions" in out
    assert "0.28" not in out  # the default of dapo
