"""`ftlevel recipes`, and files of other tools where a recipe is expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ftlevel.cli.app import run
from ftlevel.config import TrainConfig, build_config, read_recipe

AXOLOTL = """
base_model: some/model
load_in_4bit: true
load_in_8bit: false
datasets:
  - path: a.jsonl
    type: alpaca
    shards: 4
val_set_size: 0.1
output_dir: ./out
adapter: qlora
sequence_len: 1024
sample_packing: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
wandb_project:
optimizer: galore_adamw
num_epochs: 2
evals_per_epoch: 4
saves_per_epoch: 1
bf16: auto
tf32: false
special_tokens: {pad_token: x}
made_up_key: 5.0
"""
LLAMA_FACTORY = """
model_name_or_path: some/model
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
quantization_bit: 4
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
ddp_timeout: 180000000
bf16: true
resume_from_checkpoint: null
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(text: str, capsys: pytest.CaptureFixture[str]) -> tuple[TrainConfig, dict[str, str]]:
    """Return the recipe of `text`, read again, and the keys that it could not take over."""
    Path("theirs.yml").write_text(text)
    assert run(["recipes", "convert", "theirs.yml"]) == 0
    shown = capsys.readouterr()
    Path("ours.yaml").write_text(shown.out)
    lost = [line.removeprefix("# Not taken over: ") for line in shown.out.splitlines()
            if line.startswith("# Not taken over: ")]  # fmt: skip
    assert all(f"note: not taken over: {line}" in shown.err.splitlines() for line in lost)
    pairs = (line.partition(": ") for line in lost)
    return build_config([read_recipe(Path("ours.yaml"))]), {key: why for key, _, why in pairs}


def test_axolotl(capsys: pytest.CaptureFixture[str]) -> None:
    config, lost = convert(AXOLOTL, capsys)
    assert config.model.name_or_path == "some/model"
    assert (config.method.kind, config.quant.kind) == ("qlora", "4bit")
    assert config.method.model_dump()["target_modules"] == ["q_proj", "v_proj"]
    assert (config.data.dataset, config.data.format) == ("a.jsonl", "alpaca")
    assert (config.data.max_length, config.data.validation_split) == (1024, 0.1)
    assert (config.train.eval_steps, config.train.save_strategy) == (0.125, "epoch")
    assert str(config.output.dir) == "out"
    assert lost.keys() == {
        "datasets[0].shards", "optimizer", "special_tokens", "made_up_key",
    }  # fmt: skip
    assert "'galore_adamw': it keeps the gradients of whole weights" in lost["optimizer"]


def test_llama_factory(capsys: pytest.CaptureFixture[str]) -> None:
    config, lost = convert(LLAMA_FACTORY, capsys)
    assert (config.method.kind, config.quant.kind) == ("lora", "4bit")
    assert config.method.model_dump()["target_modules"] == "all-linear"
    assert (config.data.dataset, config.data.also) == ("identity", ("alpaca_en_demo",))
    assert (config.data.max_length, config.model.dtype) == (2048, "bfloat16")
    assert lost.keys() == {"template", "ddp_timeout", "dataset"}
    assert "identity, alpaca_en_demo" in lost["dataset"]


@pytest.mark.parametrize(("text", "tool"), [(AXOLOTL, "Axolotl"), (LLAMA_FACTORY, "LLaMA-Factory")])
def test_it_is_refused_until_it_is_converted(
    text: str, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs.yml").write_text(text)
    assert run(["train", "--recipe", "theirs.yml"]) == 2
    assert capsys.readouterr().err == (
        f"ftlevel: theirs.yml is a configuration of {tool}. Write it as a recipe first: "
        "ftlevel recipes convert theirs.yml > recipe.yaml\n"
    )


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("method: lora\n")
    assert run(["recipes", "list"]) == 0
    assert capsys.readouterr().out == "recipes/mine.yaml\n"
    assert run(["recipes", "show", "mine"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"method": "lora"}
    assert run(["recipes", "convert", "recipes/mine.yaml"]) == 2
    assert "ftlevel train recipes/mine.yaml" in capsys.readouterr().err
    assert run(["recipes", "convrt", "x"]) == 2
    assert "Did you mean 'convert'?" in capsys.readouterr().err
    assert run(["recipes", "show"]) == 2
