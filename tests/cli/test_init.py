"""`init`: proposed settings, terminal questions, and training with the written recipe."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path

import pytest

from command_line import Cli
from forked import Forked
from ftlevel.config import build_config, load_recipe
from run_files import ModelDir

WORDS = ("the red fox", "a blue whale", "some green frog", "this old oak")


@pytest.fixture(autouse=True)
def csv_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a directory that contains only a CSV of 80 rows with a text and a label."""
    lines = [f"{WORDS[i % 4]} number {i},{'tree' if i % 4 == 3 else 'animal'}" for i in range(80)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flags_depend_on_the_task(cli: Cli) -> None:
    Path("rl.jsonl").write_text("".join('{"prompt": "a", "answer": "b"}\n' for _ in range(8)))
    config = cli.json(
        "init --json 'my r.yaml' --task rl --dataset rl.jsonl --loss grpo --temperature 0.8 "
        "--reward exact --max-new-tokens 9"
    )
    assert config["config"]["rl"] == {
        "loss": "grpo", "temperature": 0.8, "reward": ["exact"], "max_completion_length": 9
    }  # fmt: skip
    assert config["command"].startswith("ftlevel train --recipe 'my r.yaml' --output-dir ")
    message = cli.fails("init x.yaml --dataset rows.csv --load-in-4bit false --quant 4bit --yes")
    assert "--load-in-4bit false contradicts quant.kind, which is 4bit." in message
    assert not Path("x.yaml").exists()


def test_adapter_determines_model_and_method(tiny_model_dir: ModelDir, cli: Cli) -> None:
    model = str(tiny_model_dir("bert"))
    command = "train --task text-classification --dataset rows.csv --max-steps 1"
    cli(f"{command} --model {model} --lora-r 2 --output-dir first")
    result = cli.json("init --json", "--adapter", "first", "--task", "text-classification")
    assert result["config"]["model"] == {"adapter": "first"}
    assert "method" not in result["config"]
    assert result["config"]["data"] == {"dataset": "rows.csv", "validation_split": 0.1}
    assert f"# text-classification: rows.csv with {model}." in Path("recipe.yaml").read_text()
    cli("train recipe.yaml --dry-run")


def test_init_proposes_settings_from_data(tiny_model_dir: ModelDir, cli: Cli) -> None:
    model = tiny_model_dir("bert")
    result = cli.json("init --json", "--model", model)
    proposed = {
        setting["name"]: (setting["value"], setting["reason"]) for setting in result["proposed"]
    }
    assert proposed["dataset"] == ("rows.csv", "the only file of rows in this directory")
    assert proposed["task"] == ("text-classification", "the columns are text + label")
    assert (proposed["method"][0], proposed["epochs"][0]) == ("lora", "3")
    assert proposed["validation_split"] == (0.1, "the data has no validation rows")
    config = build_config([load_recipe(Path("recipe.yaml"))])
    assert config.model_dump(mode="json", exclude_unset=True) == result["config"]
    assert result["steps"] == 27  # 72 rows, 8 per step, 3 epochs
    text = Path("recipe.yaml").read_text()
    assert "  kind: lora  # r 8, alpha 16, dropout 0\n" in text
    assert "  # max_length: " in text
    assert result["command"] in text


def test_commented_settings_match_train_defaults(tiny_model_dir: ModelDir, cli: Cli) -> None:
    cli.json("init --json", "--model", tiny_model_dir("bert"), "--num-train-epochs", 1)
    lines = Path("recipe.yaml").read_text().splitlines()
    uncommented = [
        line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in lines
    ]
    Path("fixed.yaml").write_text("\n".join(uncommented) + "\n")
    configs = []
    for name in ("recipe.yaml", "fixed.yaml"):
        configs.append(cli.json(f"train {name} --dry-run --json")["config"])
    assert (
        "max_length" not in build_config([load_recipe(Path("recipe.yaml"))]).data.model_fields_set
    )
    assert "max_length" in build_config([load_recipe(Path("fixed.yaml"))]).data.model_fields_set
    for name in ("learning_rate", "head_learning_rate"):
        automatic, explicit = (config["train"].pop(name) for config in configs)
        assert explicit == pytest.approx(automatic, rel=5e-3)
    assert configs[0] == configs[1]


def test_flags_are_written_to_recipe_and_train_uses_them(
    tiny_model_dir: ModelDir, cli: Cli
) -> None:
    flags = ["--method ia3 --max-steps 2 --set train.seed=7 --validation-split 0.2"]
    result = cli.json("init --json", "mine.yaml", "--model", tiny_model_dir("bert"), *flags)
    assert result["config"]["method"]["kind"] == "ia3"
    assert result["config"]["train"] == {"max_steps": 2, "seed": 7, "num_train_epochs": 3}
    assert not {"method", "validation_split"} & {setting["name"] for setting in result["proposed"]}
    cli(*result["command"].split()[1:], "--quiet")
    summary = json.loads((Path(result["command"].split()[-1]) / "summary.json").read_text())
    assert summary["steps"] == 2


def test_builtin_dataset_is_proposed_without_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    config = cli.json("init --json", "--max-samples", 60)["config"]
    assert (config["data"]["dataset"], config["task"]) == ("builtin:docstrings", "summarization")
    assert config["model"]["name_or_path"] == "builtin:tiny-llama"


def test_builtin_model_is_proposed_offline(cli: Cli) -> None:
    proposed = {setting["name"]: setting for setting in cli.json("init --json")["proposed"]}
    assert proposed["model"]["value"] == "builtin:tiny-llama"
    assert "all-MiniLM-L6-v2 is not available here" in proposed["model"]["reason"]


def test_qlora_is_proposed_for_large_weights(
    tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr("ftlevel.commands.init.device_memory", lambda device: 400_000)
    result = cli.json("init --json", "--model", tiny_model_dir("bert"))
    assert result["config"]["method"]["kind"] == "qlora"
    assert result["config"]["quant"]["kind"] == "4bit"
    lines = Path("recipe.yaml").read_text().splitlines()
    assert "  kind: 4bit  # 4-bit nf4" in lines


def test_errors_write_no_recipe(tiny_model_dir: ModelDir, cli: Cli) -> None:
    Path("recipe.yaml").write_text("method: lora\n")
    assert "recipe.yaml already exists" in cli.fails("init", "--yes")
    assert Path("recipe.yaml").read_text() == "method: lora\n"
    assert "there is no terminal for questions. Add --yes" in cli.fails("init", "new.yaml")
    model = tiny_model_dir("bert")
    errors = cli.fails(f"init new.yaml --yes --model {model} --task question-answering")
    assert "'text', 'label'" in errors
    errors = cli.fails("init", "new.yaml", "--yes", "--dataset", "rows2.csv")
    assert "Did you mean 'rows.csv'?" in errors
    assert "does not exist" in cli.fails("init", "no/new.yaml", "--yes", "--model", model)
    Path("more.csv").write_text("text,label\na,b\n")
    assert "(more.csv, rows.csv): choose one with --dataset" in cli.fails("init new.yaml --yes")
    Path("names.csv").write_text("en,de\nbank,Bank\n")
    errors = cli.fails("init", "new.yaml", "--yes", "--dataset", "names.csv")
    assert "--task text-generation --map prompt=en --map completion=de" in errors
    assert not Path("new.yaml").exists()


@pytest.mark.slow
def test_interactive_questions(tiny_model_dir: ModelDir) -> None:
    model = tiny_model_dir("bert")
    answers = ["nothing.csv", "", "", str(model), "", "2"]  # the first is not a file
    master, slave = pty.openpty()
    process = Forked(
        ["init"], stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "COLUMNS": "200"}
    )
    os.close(slave)
    os.write(master, ("\n".join(answers) + "\n").encode())
    output = b""
    while True:
        try:
            output += os.read(master, 4096)
        except OSError:  # the terminal is closed
            break
    os.close(master)
    text = output.decode()
    assert process.wait() == 0, text
    assert "nothing.csv: no such file" in text
    assert text.count("Dataset: a file") == 2
    assert "Task [text-classification]" in text
    assert "wrote recipe.yaml. Then: ftlevel train --recipe recipe.yaml" in text
    config = build_config([load_recipe(Path("recipe.yaml"))])
    assert (config.data.dataset, config.model.name_or_path) == ("rows.csv", str(model))
    assert (config.method.kind, config.train.num_train_epochs) == ("lora", 2)
