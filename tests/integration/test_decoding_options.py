"""Beam search and sampling, compared with transformers' `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.generate import generate
from ftlevel.config.output import Decoding, DecodingAsInTraining
from ftlevel.errors import ConfigError
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import resolve_source
from run_files import read_rows

pytestmark = pytest.mark.usefixtures("work_dir")

SHORT = ["--max-samples", "16", "--max-length", "96", "--overlong", "drop", "--batch-size", "4",
         "--dtype", "float32", "--lr", "1e-3", "--quiet", "--max-steps", "4", "--logging-steps",
         "1", "--max-new-tokens", "6", "--set", "train.max_generate_samples=3",
         "--set", "data.subset=generation", "--set", "data.max_eval_samples=8"]  # fmt: skip
BUILTIN = "builtin:tiny-llama"


def train(*arguments: str, out: str) -> list[dict[str, Any]]:
    command = ["train", "--output-dir", out, *SHORT, "--predict-with-generate", *arguments]
    assert run(command) == 0
    return read_rows(Path(out, "metrics.jsonl"))


def test_beam_search_matches_transformers() -> None:
    from transformers import AutoModelForCausalLM

    source = resolve_source(BUILTIN, None, False)
    tokenizer = load_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source.path).eval()
    turns = [{"role": "user", "content": "What does open do?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=4, do_sample=False,
            max_new_tokens=12, pad_token_id=0,
        )  # fmt: skip
    expected = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
    settings: dict[str, Any] = {"max_new_tokens": 12, "device": "cpu"}
    (answer,), _ = generate(BUILTIN, ["What does open do?"], num_beams=4, **settings)
    (greedy_answer,), _ = generate(BUILTIN, ["What does open do?"], **settings)
    assert answer.text == expected
    assert answer.text != greedy_answer.text


STEPS = ["--eval-strategy", "steps", "--eval-steps", "2", "--set", "method.lora_dropout=0.2"]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the records of a run with greedy decoding."""
    return train(*STEPS, out=str(tmp_path_factory.mktemp("greedy") / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoding", [["--num-beams", "3"], ["--temperature", "1", "--top-p", "0.9"]]
)
def test_decoding_options_do_not_change_training_loss(
    decoding: list[str], greedy: list[dict[str, Any]], cli: Cli
) -> None:
    records = train(*STEPS, *decoding, out="other")
    assert [r["loss"] for r in greedy if "loss" in r] == [r["loss"] for r in records if "loss" in r]
    scores = [
        [r["eval_rouge1"] for r in run_records if "eval_loss" in r]
        for run_records in (greedy, records)
    ]
    assert scores[0] != scores[1]
    evaluated = cli.json("evaluate other --resamples 0 --no-base --json")["metrics"][
        "rouge1"
    ]  # as in training
    assert evaluated == pytest.approx(scores[1][-1])


def test_predict_uses_decoding_options(capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.jsonl").write_text('{"prompt": "What does open do?"}\n')
    predictions = {}
    for decoding in ("", "--num-beams 4", "--temperature 2"):
        command = ["predict", BUILTIN, "--task", "text-generation", "--dataset", "asked.jsonl"]
        assert run([*command, "--max-new-tokens", "12", "-q", *decoding.split()]) == 0
        predictions[decoding] = json.loads(capsys.readouterr().out)["prediction"]
    assert len(set(predictions.values())) == 3


def test_decoding_strategy_replaces_that_of_training() -> None:
    trained = Decoding(temperature=0.7, top_p=0.9)
    assert DecodingAsInTraining().decoding(trained) == {
        "num_beams": 1, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip
    assert DecodingAsInTraining(num_beams=2).decoding(trained) == {
        "num_beams": 2, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    greedy = {"num_beams": 1, "temperature": 0.0, "top_p": 1.0}
    assert DecodingAsInTraining(temperature=0.0).decoding(trained) == greedy
    with pytest.raises(ConfigError, match="needs --temperature 1"):
        DecodingAsInTraining(top_p=0.5).decoding(Decoding())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --prompt y --num-beams 2 --temperature 1", "Drop one of them."),
        (
            "generate x --prompt y --top-p 0.5",
            "--top-p 0.5 needs --temperature 1: it samples. Add --temperature 1, or drop --top-p.",
        ),
        ("generate x --prompt y --do-sample", "Add --temperature 1."),
        ("train --dry-run --do_sample true", "Add --temperature 1."),
        ("train --dry-run --num-beams 0", "--num-beams"),
    ],
)
def test_invalid_decoding_options_are_rejected(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    assert message in " ".join(capsys.readouterr().err.split())
