"""`--system` and `--train-on-inputs`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlevel.cli.app import run
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import IGNORED, PromptFormat, encode_causal, encode_prompt
from ftlevel.data.formats.examples import Conversation, SourceTarget
from ftlevel.data.formats.turns import Message
from ftlevel.merging.formats.ollama import format_modelfile
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source

SYSTEM = "Be brief."
LONG = " ".join(f"Rule {n} of this house is to say the number alone." for n in range(12))
FAST = ["--dtype", "float32", "--lr", "1e-3", "--logging-steps", "1", "--quiet", "--batch-size",
        "6", "--max-steps", "2", "--set", "data.gate.near_duplicates=ignore"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{LONG} Say {n}.", "completion": f"number {n}"} for n in range(6)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_tokenizer(resolve_source("builtin:tiny-llama", None, False))


def train(*arguments: str, out: str) -> dict[str, Any]:
    """Run `ftlevel train`; return its summary, with the losses of all steps."""
    given = ["train", "--dataset", "rows.jsonl", "--output-dir", out, *FAST, *arguments]
    assert run(given) == 0
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    summary: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return {**summary, "losses": [line["loss"] for line in lines if "loss" in line]}


@pytest.mark.slow
def test_prompts_are_learned_fast_and_plain(llama: Any) -> None:
    fast = train("--train-on-inputs", "--system", SYSTEM, out="fast")
    plain = train("--completion-only-loss", "false", "--system", SYSTEM, "--no-fast", out="plain")
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert fast["speed"]["prefixes_shared"]
    assert fast["losses"][0] == pytest.approx(_loss_of_whole_rows(llama), rel=1e-4)


def _loss_of_whole_rows(tokenizer: Any) -> float:
    """Return transformers' own loss of all tokens but those behind the last end of a turn."""
    from transformers import AutoModelForCausalLM

    source = resolve_source("builtin:tiny-llama", None, False)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    total = count = 0.0
    for line in Path("rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]},
                 {"role": "assistant", "content": row["completion"]}]  # fmt: skip
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.slow
def test_answers_are_what_is_evaluated() -> None:
    more = ["--eval-file", "rows.jsonl", "--set", "train.eval_on_start=true", "--set",
            "data.gate.leaked=ignore", "--set", "train.predict_with_generate=true"]  # fmt: skip
    whole = train("--train-on-inputs", *more, out="whole")
    answers = train(*more, out="answers")
    assert whole["metrics_before"] == answers["metrics_before"]
    assert whole["data"]["supervised"] > 10 * answers["data"]["supervised"]
    assert whole["losses"][0] != pytest.approx(answers["losses"][0], rel=0.1)


def test_rows_have_the_turn_that_the_model_is_asked_with(llama: Any) -> None:
    form = PromptFormat("chat-template", system=SYSTEM)
    own = Conversation((Message("system", "Own."), Message("user", "Hi"),
                        Message("assistant", "Yes")), 1)  # fmt: skip
    rows = encode_causal(llama, [SourceTarget("Hi", "Yes", 0)], form)
    rows += encode_causal(llama, [own], form)
    for row, system in zip(rows, (SYSTEM, "Own."), strict=True):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
        text = llama.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        expected = llama(text, add_special_tokens=False)["input_ids"]
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)  # type: ignore[arg-type]
        assert row.input_ids[:start] == expected
    assert (
        encode_prompt(llama, form, "Hi")
        == rows[0].input_ids[: len(encode_prompt(llama, form, "Hi"))]
    )


def test_a_model_without_a_chat_template(llama: Any) -> None:
    form = PromptFormat("plain", system=SYSTEM, separator="\n")
    assert form.plain_prompt("Hi") == f"{SYSTEM}\n\nHi\n"
    own = Conversation((Message("system", "Own."), Message("user", "Hi"),
                        Message("assistant", "Yes")), 0)  # fmt: skip
    (row,) = encode_causal(llama, [own], form)
    assert llama.decode(row.input_ids, skip_special_tokens=True) == "Own.\n\nHi\nYes"
    (row,) = encode_causal(llama, [SourceTarget("Hi", "Yes", 0)], form)
    assert llama.decode(row.input_ids, skip_special_tokens=True) == f"{SYSTEM}\n\nHi\nYes"


def test_the_card_says_so_only_where_there_is_one() -> None:
    assert "system" not in PromptFormat("plain").to_dict()
    assert PromptFormat(**PromptFormat("plain", system="x").to_dict()).system == "x"
    assert DataConfig().system is None
    assert f'SYSTEM """{SYSTEM}"""' in format_modelfile("m.gguf", None, [], [], SYSTEM)
    assert "SYSTEM" not in format_modelfile("m.gguf", None, [], [], "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--system", "x", "--task", "token-classification"], "--system is for tasks that write"),
        (["--train-on-inputs", "--task", "masked-lm"], "--train-on-inputs is for tasks that"),
        (
            ["--train-on-inputs", "--overlong", "truncate-prompt"],
            "cuts prompts, and --train-on-inputs supervises them. Use --overlong drop, or drop "
            "one of them.",
        ),
        (["--train-on-inputs", "--mask-prompt"], "contradicts data.train_on_inputs"),
        (["--system", "x", "--map", "text=prompt", "--format", "text"], "rows are plain text"),
        (["--model", "./t5", "--system", "x"], "needs a model that generates answers. Drop it."),
        (["--model", "./t5", "--train-on-inputs"], "writes its target alone"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tiny_model_dir: Callable[..., Path],
) -> None:
    Path("t5").symlink_to(tiny_model_dir("t5"))
    assert run(["train", "--dry-run", "--dataset", "rows.jsonl", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
