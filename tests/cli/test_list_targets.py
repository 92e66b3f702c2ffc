from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.models.families import FAMILIES
from unit.models.meta_models import tiny_config

LLAMA = """\
llama, decoder

Linear              Type    in -> out                    Default
----------------------------------------------------------------
model.layers.{i}
  self_attn.q_proj  Linear  hidden -> heads*head_dim     yes
  self_attn.k_proj  Linear  hidden -> kv_heads*head_dim  yes
  self_attn.v_proj  Linear  hidden -> kv_heads*head_dim  yes
  self_attn.o_proj  Linear  heads*head_dim -> hidden     yes
  mlp.gate_proj     Linear  hidden -> ffn                yes
  mlp.up_proj       Linear  hidden -> ffn                yes
  mlp.down_proj     Linear  ffn -> hidden                yes

all-linear  q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (the
            default)
attention   q_proj, k_proj, v_proj, o_proj (for --target-modules)
heads       text-generation: lm_head
            text-classification: score
            token-classification: score
            question-answering: qa_outputs
            Heads are never adapted; a task's new head is trained in full and
            saved.
norms       model.layers.{i}: input_layernorm, post_attention_layernorm
            model.norm
embeddings  model.embed_tokens
same names  llama-2, llama-3, llama2, llama3, codellama, tinyllama, vicuna,
            smollm, smollm2, yi
LoRA r=8    r * (in + out) parameters per linear layer. Llama-2-7B, all-linear:
            19,988,480 trainable; 80.0 MB in float32.
"""


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
    arguments: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list-targets", *arguments]) == code
    captured = capsys.readouterr()
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


def test_family_name_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom ftlevel.cli.app import run\nassert run(['list-targets', 'llama']) == "
        "0\nassert run(['list-targets', 'llama', '--json']) == 0\nheavy = {'torch', "
        "'transformers', 'peft', 'datasets', 'numpy', 'rich'}\nassert not heavy & "
        "set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
