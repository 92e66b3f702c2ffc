"""`--system` and `--train-on-inputs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import encode_causal
from ftlevel.data.encoding.prompts import PromptFormat, encode_prompt
from ftlevel.data.encoding.row import IGNORED
from ftlevel.data.formats.examples import Conversation, SourceTarget
from ftlevel.data.formats.turns import Message
from ftlevel.extras.serving.ollama import format_modelfile
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source
from run_files import ModelDir

SYSTEM = "Be brief."
LONG = " ".join(f"Rule {n} of this house is to say the number alone." for n in range(12))
FAST = ["--dtype", "float32", "--lr", "1e-3", "--logging-steps", "1", "--quiet", "--batch-size",
        "6", "--max-steps", "2", "--set", "data.gate.near_duplicates=ignore"]  # fmt: skip


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{LONG} Say {n}.", "completion": f"number {n}"} for n in range(6)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def llama_tokenizer() -> Any:
    return load_tokenizer(resolve_source("builtin:tiny-llama", None, False))


def train(*arguments: str, out: str) -> dict[str, Any]:
    """Run `ftlevel train`; return its summary, with the losses of all steps."""
    command = ["train", "--dataset", "rows.jsonl", "--output-dir", out, *FAST, *arguments]
    assert run(command) == 0
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    summary: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return {**summary, "losses": [line["loss"] for line in lines if "loss" in line]}


@pytest.mark.slow
def test_train_on_inputs_fast_step_matches_plain_step(llama_tokenizer: Any) -> None:
    fast = train("--train-on-inputs", "--system", SYSTEM, out="fast")
    plain = train("--completion-only-loss", "false", "--system", SYSTEM, "--no-fast", out="plain")
    assert fast["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert fast["speed"]["prefixes_shared"]
    assert fast["losses"][0] == pytest.approx(reference_loss(llama_tokenizer), rel=1e-4)


def reference_loss(tokenizer: Any) -> float:
    """Return the loss of transformers over all tokens up to the last end of turn."""
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
def test_evaluation_ignores_train_on_inputs() -> None:
    options = ["--eval-file", "rows.jsonl", "--set", "train.eval_on_start=true", "--set",
               "data.gate.leaked=ignore", "--set", "train.predict_with_generate=true",
               "--max-new-tokens", "4"]  # fmt: skip
    all_tokens = train("--train-on-inputs", *options, out="whole")
    answers = train(*options, out="answers")
    assert all_tokens["metrics_before"] == answers["metrics_before"]
    assert all_tokens["data"]["supervised"] > 10 * answers["data"]["supervised"]
    assert all_tokens["losses"][0] != pytest.approx(answers["losses"][0], rel=0.1)


def test_training_rows_start_with_generation_prompt(llama_tokenizer: Any) -> None:
    prompt_format = PromptFormat("chat-template", system=SYSTEM)
    conversation = Conversation((Message("system", "Own."), Message("user", "Hi"),
                                 Message("assistant", "Yes")), 1)  # fmt: skip
    rows = encode_causal(llama_tokenizer, [SourceTarget("Hi", "Yes", 0)], prompt_format)
    rows += encode_causal(llama_tokenizer, [conversation], prompt_format)
    for row, system in zip(rows, (SYSTEM, "Own."), strict=True):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
        text = llama_tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        expected = llama_tokenizer(text, add_special_tokens=False)["input_ids"]
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)  # type: ignore[arg-type]
        assert row.input_ids[:start] == expected
    assert (
        encode_prompt(llama_tokenizer, prompt_format, "Hi")
        == rows[0].input_ids[: len(encode_prompt(llama_tokenizer, prompt_format, "Hi"))]
    )


def test_system_prompt_without_chat_template(llama_tokenizer: Any) -> None:
    prompt_format = PromptFormat("plain", system=SYSTEM, separator="\n")
    assert prompt_format.plain_prompt("Hi") == f"{SYSTEM}\n\nHi\n"
    conversation = Conversation((Message("system", "Own."), Message("user", "Hi"),
                                 Message("assistant", "Yes")), 0)  # fmt: skip
    (row,) = encode_causal(llama_tokenizer, [conversation], prompt_format)
    assert llama_tokenizer.decode(row.input_ids, skip_special_tokens=True) == "Own.\n\nHi\nYes"
    (row,) = encode_causal(llama_tokenizer, [SourceTarget("Hi", "Yes", 0)], prompt_format)
    assert llama_tokenizer.decode(row.input_ids, skip_special_tokens=True) == f"{SYSTEM}\n\nHi\nYes"


def test_system_prompt_is_stored_only_if_set() -> None:
    assert "system" not in PromptFormat("plain").to_dict()
    assert PromptFormat(**PromptFormat("plain", system="x").to_dict()).system == "x"
    assert DataConfig().system is None
    assert f'SYSTEM """{SYSTEM}"""' in format_modelfile("m.gguf", None, [], [], SYSTEM)
    assert "SYSTEM" not in format_modelfile("m.gguf", None, [], [], "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "x", "--task", "token-classification"], "it is for tasks that write"),
        (["--train-on-inputs", "--task", "masked-lm"], "it is for tasks that"),
        (
            ["--train-on-inputs", "--overlong", "truncate-prompt"],
            "one cuts prompts and the other supervises them. Use --overlong drop, or drop one of "
            "them.",
        ),
        (["--train-on-inputs", "--mask-prompt"], "contradicts data.train_on_inputs"),
        (["--system", "x", "--map", "text=prompt", "--format", "text"], "rows are plain text"),
        (["--model", "./t5", "--system", "x"], "needs a model that generates answers. Drop it."),
        (["--model", "./t5", "--train-on-inputs"], "writes its target alone"),
    ],
)
def test_invalid_prompt_options_are_rejected(
    arguments: list[str], message: str, cli: Cli, tiny_model_dir: ModelDir
) -> None:
    Path("t5").symlink_to(tiny_model_dir("t5"))
    error = cli.fails("train --dry-run --dataset rows.jsonl", *arguments)
    assert message in " ".join(error.split())
