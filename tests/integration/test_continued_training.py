"""Continued training (`--adapter`) starts from the adapter's weights, for every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir, read_json, train, write_rows

SHORT = ["--dataset", "turns", "--set", "data.max_eval_samples=4", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop"]  # fmt: skip
CONTINUE = ["--adapter", "run", "--eval-on-start", "--max-steps", "2"]


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_turns(Path("turns"))


@pytest.fixture
def base(tiny_model_dir: ModelDir) -> Path:
    return tiny_model_dir("llama", chat=True)


METHODS = {
    "lora": ["--lora-r", "4", "--lora-alpha", "10"],
    "rslora and dora": ["--rslora", "--dora", "--no-fast"],
    "qlora": ["--method", "qlora", "--double-quant"],
    "loftq": ["--init", "loftq", "--quant", "4bit"],
    "pissa": ["--init", "pissa"],
    "eva": ["--init", "eva"],
    "ranks": ["--set", "method.rank_pattern={q_proj: 3}", "--set", "method.bias=lora_only",
              "--target-modules", "q_proj,v_proj"],
    "modules-to-save": ["--set", "method.modules_to_save=[embed_tokens]"],
    "tokens": ["--set", "method.trainable_token_indices=[5, 6]"],
    "ia3": ["--method", "ia3"],
    "vera": ["--method", "vera"],
    "oft": ["--method", "oft"],
    "boft": ["--method", "boft"],
    "loha": ["--method", "loha"],
    "lokr": ["--method", "lokr"],
    "miss": ["--method", "miss", "--set", "method.r=8"],
    "shira": ["--method", "shira", "--set", "method.r=4"],
    "hira": ["--method", "hira"],
    "gralora on 4 bits": ["--method", "gralora", "--quant", "4bit"],
    "c3a": ["--method", "c3a", "--set", "method.block_size=16"],
    "ln-tuning": ["--method", "ln-tuning"],
    "prefix": ["--method", "prefix"],
    "prompt": ["--method", "prompt", "--set", "method.num_virtual_tokens=7"],
    "adapter": ["--method", "adapter"],
    "projected prefix": ["--method", "prefix", "--set", "method.prefix_projection=true"],
    "p-tuning": ["--method", "p-tuning"],
    "full": ["--method", "full"],
}  # fmt: skip


USED_WITHOUT_RUN = ("lora", "pissa", "prefix")
"""Methods whose adapter directory is also used without its run."""
PEFT_ONLY = (
    "vera",
    "oft",
    "boft",
    "loha",
    "lokr",
    "miss",
    "shira",
    "hira",
    "gralora on 4 bits",
    "c3a",
)
"""Methods without code of ftlevel that is executed here."""
SWEEP_METHODS = (*PEFT_ONLY, "eva", "projected prefix")
"""Also methods that share their initialization or projection with another one."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.sweep if n in SWEEP_METHODS else pytest.mark.slow)
        for n in METHODS
    ],
)
def test_continued_run_starts_with_adapter_metrics(base: Path, name: str) -> None:
    before = train("--model", str(base), *SHORT, *METHODS[name], "--max-steps", "3")
    step_options = [flag for flag in METHODS[name] if flag == "--no-fast"]
    after = train(*SHORT, *CONTINUE, *step_options, out="on")
    expected = before["metrics"]
    if name == "pissa":  # saved as plain LoRA, which is added to other base weights
        expected = pytest.approx(expected, rel=1e-6)
    assert after["metrics_before"] == expected
    assert after["metrics"] != before["metrics"]
    if name != "full":
        assert after["method"] == ("prompt" if name == "p-tuning" else before["method"])
        card = read_json("on/adapter/ftlevel.json")
        assert card["adapter"] == after["adapter"] != {}
        adapter = yaml.safe_load(Path("on/config.yaml").read_text())["model"]["adapter"]
        assert adapter == str(Path("run").resolve())  # also valid from another directory
        assert "continued from the adapter `run`" in Path("on/README.md").read_text()
    if name in USED_WITHOUT_RUN:
        shutil.copytree("run/adapter", "alone")
        alone = train(*SHORT, "--adapter", "alone", *CONTINUE[2:], out="on-alone")
        assert alone["metrics_before"] == expected


@pytest.mark.slow
def test_continued_run_can_be_resumed(base: Path) -> None:
    train("--model", str(base), *SHORT, *METHODS["lora"], "--max-steps", "3")
    options = [*SHORT, "--adapter", "run", "--max-steps", "4", "--save-steps", "2"]
    train(*options, out="on")
    expected = Path("on/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree("on/adapter")
    shutil.rmtree("on/checkpoints/checkpoint-4")
    train("--resume", out="on")
    assert Path("on/adapter/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ia3", "seqcls"])
def test_plain_peft_adapter_can_be_continued(
    base: Path, kind: str, tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "text-classification" if kind == "seqcls" else "text-generation"
    if kind == "seqcls":
        task_data.write(Path("data"), "class")
        base = tiny_model_dir("bert", "seqcls")
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, ignore_mismatched_sizes=True
        )
        config = LoraConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS")
    else:
        write_turns(Path("data"))
        model = AutoModelForCausalLM.from_pretrained(base)
        config = (
            LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
            if kind == "lora"
            else IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            )
        )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained("plain")
    options = ["--dataset", "data", "--batch-size", "4", "--dtype", "float32"]
    summary = train(*options, "--adapter", "plain", *CONTINUE[2:], out="on")
    assert summary["method"] == ("ia3" if kind == "ia3" else "lora")
    assert (summary["model"]["name"], summary["task"]) == (str(base), task)
    assert summary["data"]["validation_rows"] == 6
    message = capsys.readouterr().err
    if kind == "seqcls":  # evaluate needs class names, which it does not have
        assert "plain stores no class names: a, b" in message
        return
    data = ["--dataset", "data/validation.jsonl", "--device", "cpu"]
    assert run(["evaluate", "plain", "--task", task, *data, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert summary["metrics_before"]["loss"] == pytest.approx(evaluated, rel=1e-2)  # in bfloat16


def write_turns(directory: Path) -> None:
    directory.mkdir()
    for split, rows in (("train", range(12)), ("validation", range(20, 26))):
        lines = [{"prompt": f"Say {i}.", "completion": f"the number {i}"} for i in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{split}.jsonl").write_text(text)


def test_continued_classifier_keeps_its_head(tiny_model_dir: ModelDir, cli: Cli) -> None:
    task_data.write(Path("data"), "class")
    short = ["--batch-size", "4", "--dtype", "float32", "--max-steps", "3"]
    before = train("--model", str(tiny_model_dir("bert")), "--dataset", "data", *short)
    after = train("--dataset", "data", "--adapter", "run", "--eval-on-start", *short, out="on")
    assert after["metrics_before"] == before["metrics"]
    assert "head learning rate" not in {choice["name"] for choice in after["choices"]}
    rows = [{"text": f"the word {i}", "label": "b"} for i in range(8)]
    write_rows("some.jsonl", rows)
    one_class_data = ["--dataset", "some.jsonl", "--set", "data.gate.one_class=ignore"]
    one_class = train(*one_class_data, "--adapter", "run", *short, out="some")
    assert one_class["data"]["labels"] == ["a", "b"], "the head has two, though the rows have one"
    write_rows("other.jsonl", ({**r, "label": "c"} for r in rows))
    message = cli.fails("train --dataset other.jsonl --adapter run")
    assert "other.jsonl:1: label 'c' (8 rows) is not one of the 2 classes that" in message


@pytest.fixture
def base_with_run(base: Path) -> Path:
    train("--model", str(base), *SHORT, "--lora-r", "4", "--max-steps", "1")
    return base


def test_options_that_contradict_adapter_are_rejected(
    base_with_run: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    other = tiny_model_dir("gpt2")
    for options, message in (
        (["--lora-r", "8"], "--lora-r 8: --adapter run has 4. Drop --lora-r, or train a new adap"),
        (["--method", "ia3"], "--method ia3: --adapter run has lora."),
        (["--dora"], "--dora True: --adapter run has False."),
        (["--task", "summarization"], "--task summarization: --adapter run has the task text-gen"),
        (["--quant", "4bit"], "--quant 4bit: --adapter run has a base of --quant none."),
        (["--model", str(other)], "run/adapter was trained on"),
        (["--output-dir", "run", "--overwrite"], "--output-dir run contains --adapter run, which"),
    ):
        captured = cli.run("train --adapter run", *SHORT, *options, code=2)
        assert message in captured.err
        assert "loading the model" not in captured.out
    error = cli.fails("train --adapter nowhere/x")
    assert "--adapter nowhere/x does not exist. Name a run" in error
    train(*SHORT, "--adapter", "run", "--lora-r", "4", "--lora-dropout", "0.1", "--max-steps", "1",
          "--model", str(base_with_run), out="on")  # fmt: skip


def test_unsupported_adapter_cannot_be_continued(base: Path, cli: Cli) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained("ada")
    error = cli.fails("train --adapter ada")
    assert "by --method adalora, which cannot be continued: its ranks" in error
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    get_peft_model(model, config).save_pretrained("biased")
    error = cli.fails("train --adapter biased", *SHORT)
    assert "--adapter biased: its lora_bias is true, and in training it would be false" in error


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialization_outside_the_file_is_exported_before_it_is_continued(
    base: Path, init: str, cli: Cli
) -> None:
    """PEFT repeats the initialization when it loads the adapter, which changes the base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    get_peft_model(model, config).save_pretrained("moved")
    message = cli.fails("train --adapter moved", *SHORT)
    assert f"--adapter moved cannot be continued. init_lora_weights is {init}: its" in message
    assert "ftlevel export ADAPTER --format peft --out DIR" in message
    cli("export moved --format peft --out plain --quiet")
    assert train(*SHORT, "--adapter", "plain", "--max-steps", "1", out="on")["method"] == "lora"


def test_loftq_of_peft_is_neither_continued_nor_merged(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT's LoftQ rounds the base whenever it loads the adapter, but only on a GPU."""
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained("moved")
    path = Path("moved/adapter_config.json")
    fields = read_json(path)
    path.write_text(json.dumps({**fields, "init_lora_weights": "loftq"}))
    for command in (["train", "--adapter", "moved", *SHORT], ["merge", "moved", "--out", "out"]):
        assert run(command) == 2
        assert "init_lora_weights is loftq: its initialization" in capsys.readouterr().err
    assert not Path("out").exists()
    assert run(["evaluate", "moved", "--dataset", "turns", "--device", "cpu"]) == 2
    message = "moved: init_lora_weights is loftq, and PEFT then rounds the base weights"
    assert message in capsys.readouterr().err
