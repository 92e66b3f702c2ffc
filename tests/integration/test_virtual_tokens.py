"""Prefix and prompt methods: complete runs, generation, resume and rejected options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from command_line import Cli
from run_files import ModelDir, read_json, train, write_rows

pytestmark = pytest.mark.usefixtures("work_dir")

SHORT = ["--max-samples", "16", "--set", "data.max_eval_samples=8", "--batch-size", "4"]
PROJECTED_PREFIX = ["--method", "prefix", "--set", "method.prefix_projection=true"]
LSTM = ["--method", "p-tuning", "--set", "method.encoder_reparameterization_type=LSTM",
        "--set", "method.encoder_hidden_size=16"]  # fmt: skip


def load_adapter(out: str) -> dict[str, Any]:
    return load_file(Path(out, "adapter", "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "tensors"),
    [
        (["--method", "prefix"], 4),
        ([*PROJECTED_PREFIX, "--quant", "4bit"], 4),
        (["--method", "prompt", "--gradient-checkpointing"], 1),
        (["--method", "prompt", "--set", "method.prompt_tuning_init=TEXT", "--set",
          "method.prompt_tuning_init_text=Say what it does"], 1),
        (["--method", "p-tuning", "--quant", "8bit"], 1),
    ],
)  # fmt: skip
def test_virtual_token_run_passes_checks_and_generates(
    arguments: list[str], tensors: int, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    model = ("--model", str(tiny_model_dir("llama", chat=True)), "--overlong", "drop")
    summary = train(*arguments, *model, *SHORT, "--max-steps", "2")
    proof = summary["proof"]
    assert proof["reload_difference"] == 0
    assert proof["adapter_effect"] > 0
    assert proof["idle_tensors"] == 0
    assert proof["frozen_tensors"] == 21
    assert len(load_adapter("run")) == tensors  # no MLP, no LSTM
    card = read_json("run/adapter/ftlevel.json")
    assert card["needs_import"] == "ftlevel.adapters"
    prompts = ["--prompt", "def f(): return 1", "--prompt", "x"]
    command = ["generate", "run", *prompts, "--compare-base", "--max-new-tokens", "4", "--json"]
    answers = cli.json(*command)["answers"]
    assert [answer["prompt"] for answer in answers] == prompts[1::2]
    assert all(isinstance(answer[key], str) for answer in answers for key in ("text", "base"))


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", "prefix"), ("bart", "prefix"), ("bert", "p-tuning"), ("llama", "prompt")],
)
def test_classification_head_is_trained_and_saved(
    family: str, method: str, tiny_model_dir: ModelDir
) -> None:
    rows = [
        {"text": f"the {word} thing of {n}", "label": word}
        for n in range(6)
        for word in ("good", "bad")
    ]
    write_rows("rows.jsonl", rows)
    summary = train(
        "--method", method, "--task", "text-classification", "--model",
        str(tiny_model_dir(family)), "--dataset", "rows.jsonl", "--validation-split", "0.25",
        "--max-steps", "2",
    )  # fmt: skip
    assert summary["proof"]["reload_difference"] == 0
    assert summary["metrics"]["accuracy"] >= 0
    names = load_adapter("run").keys()
    assert any("classif" in name or "score" in name for name in names)
    assert any("pooler" in name for name in names) == (
        family == "bert"
    )  # BERT's pooler is also new


@pytest.mark.parametrize("arguments", [PROJECTED_PREFIX, LSTM], ids=["prefix", "p-tuning"])
def test_resumed_prompt_encoder_matches_uninterrupted_run(arguments: list[str]) -> None:
    """Checkpoints keep the MLP or LSTM, and both runs end with the same adapter."""
    import shutil

    options = [*arguments, *SHORT, "--max-steps", "2", "--save-steps", "1", "--dtype", "float32"]
    train(*options, out="whole")
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/adapter")
    shutil.rmtree("cut/checkpoints/checkpoint-2")
    train(*options, "--resume", out="cut")
    expected, resumed = load_adapter("whole"), load_adapter("cut")
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)


@pytest.mark.parametrize("arguments", [PROJECTED_PREFIX, LSTM], ids=["prefix", "p-tuning"])
def test_saved_prompt_is_that_of_the_last_evaluation(arguments: list[str], cli: Cli) -> None:
    """The MLP or LSTM computes in bfloat16 while training; so does what it is replaced by."""
    summary = train(*arguments, *SHORT, "--max-steps", "2", "--dtype", "bfloat16")
    metrics = cli.json("evaluate run --json --no-base --resamples 0")["metrics"]
    assert metrics == {name: summary["metrics"][name] for name in metrics}


def test_prefix_on_unsupported_family_is_rejected(cli: Cli) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained("bloom")
    message = " ".join(cli.fails("train --method prefix --model bloom --output-dir run").split())
    assert "--method prefix" in message
    assert "bloom" in message
    assert "computes attention without transformers' AttentionInterface" in message
    assert "Use --method prompt" in message
    assert not Path("run").exists()


def test_too_many_virtual_tokens_are_rejected(tiny_model_dir: ModelDir, cli: Cli) -> None:
    model = str(tiny_model_dir("gpt2"))
    command = ["train", "--method", "prompt", "--model", model, "--output-dir", "run"]
    error = cli.fails(*command, "--set method.num_virtual_tokens=5000")
    assert "leaves no positions for text" in " ".join(error.split())
