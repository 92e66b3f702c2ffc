from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.models.families import FAMILIES
from unit.models.meta_models import tiny_config

LLAMA = Path(__file__).with_name("list_targets_llama.txt").read_text()


@pytest.fixture(autouse=True)
def _terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_config("gpt2").save_pretrained(tmp_path)
    return str(tmp_path)


def test_llama_output(cli: Cli) -> None:
    assert cli("list-targets llama") == LLAMA


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_80_columns(family: str, cli: Cli) -> None:
    out = cli(f"list-targets {family}")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert out.isascii()
    for stack in FAMILIES[family].stacks:
        for linear in stack.linears:
            assert f"  {linear.path}  " in out


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["GPT_NEO"], 0, "gpt_neo, decoder", ""),
        (["llama", "--lora-r", "16"], 0, "39,976,960 trainable", ""),
        (["llama", "--lora_r=16"], 0, "39,976,960 trainable", ""),
        (["t5"], 0, "wi_0  Linear  hidden -> ffn             yes (2)", ""),
        (["mixtral"], 0, "target_parameters: mlp.experts.gate_up_proj", ""),
        (["lama"], 2, "", "'lama' is neither a supported family nor a model."),
        (["lama"], 2, "", "Did you mean 'llama'"),
        (["llama", "--lora-r", "0"], 2, "", "--lora-r"),
        ([], 2, "", "Missing argument"),
    ],
)
def test_arguments_exit_code_and_output(
    arguments: list[str], code: int, out: str, err: str, cli: Cli
) -> None:
    captured = cli.run("list-targets", *arguments, code=code)
    assert out in captured.out
    assert err in captured.err
    assert not (captured.out if code else captured.err)


def test_model_output(model: str, cli: Cli) -> None:
    out = cli(f"list-targets {model} --lora-r 4")
    assert out.startswith(f"{model}, gpt2, GPT2LMHeadModel, decoder, 96,320 parameters\n")
    assert (
        "Linear         Type    in -> out  Count  LoRA r=4  "
        "Default\n----------------------------------------------------------\ntransformer.h.{i}\n  "
        "attn.c_attn  Conv1D  64 -> 192      2     2,048  yes\n"
    ) in out
    assert "6,656 trainable, 6.91% of the model" in " ".join(out.split())


def test_json_output_is_one_object(model: str, cli: Cli) -> None:
    captured = cli.run(f"list-targets {model} --json --lora-r 4")
    report = json.loads(captured.out)
    assert report["source"] == "model"
    assert report["total_parameters"] == 96_320
    assert report["linears"][0] == {
        "name": "c_attn",
        "pattern": "transformer.h.{i}.attn.c_attn",
        "block": "transformer.h.{i}",
        "type": "Conv1D",
        "shape": "64 -> 192",
        "attention": True,
        "all_linear": True,
        "default": True,
        "in_features": 64,
        "out_features": 192,
        "count": 2,
        "lora_parameters": 2048,
        "only": "",
    }
    assert captured.err == ""
