"""Other tools' spellings: each takes effect, agrees with what is done, or is answered."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import write_docs
from cli.spellings import SPELLINGS, ForeignFlag
from ftlevel.cli.app import run
from ftlevel.cli.flags import CommandInput, add_command, read_config
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError

_FOUND: list[TrainConfig] = []


@cache
def _program() -> Any:
    def command(inputs: CommandInput) -> None:
        _FOUND.append(read_config(inputs)[0])

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, FLAGS)
    return get_command(app)


def resolve(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration of a command line of train."""
    _program()(args=list(arguments), standalone_mode=False)
    return _FOUND.pop()


def field_of(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None)  # a field of another method
    return value if path != "output.dir" else str(value)


ACCEPTED = [row for row in SPELLINGS if row.sets]
AGREEING = [row for row in SPELLINGS if row.agrees]
ANSWERED = [row for row in SPELLINGS if row.answer]


def _names(rows: Sequence[ForeignFlag]) -> list[str]:
    return [f"{row.tool}: {row.typed}" for row in rows]


@pytest.mark.parametrize("row", ACCEPTED, ids=_names(ACCEPTED))
def test_a_spelling_takes_effect(row: ForeignFlag) -> None:
    beside = shlex.split(row.beside)
    config = resolve([*shlex.split(row.typed), *beside])
    before = resolve(beside)
    for path, value in row.sets.items():
        assert field_of(config, path) == value
        assert field_of(before, path) != value


@pytest.mark.parametrize("row", AGREEING, ids=_names(AGREEING))
def test_a_spelling_agrees_and_says_why(row: ForeignFlag, capsys: pytest.CaptureFixture[str]) -> None:
    typed = shlex.split(row.typed)
    assert resolve(typed) == resolve([])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {typed[0].replace('_', '-')}")
    assert row.agrees in line


@pytest.mark.parametrize("row", ANSWERED, ids=_names(ANSWERED))
def test_a_spelling_is_answered(row: ForeignFlag) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(shlex.split(row.typed))
    (line,) = refused.value.problems
    assert row.answer in line
    assert "\n" not in line
    assert refused.value.exit_code == 2


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_docs.main(["coming-from", "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on"])
def test_words_for_a_switch(word: str) -> None:
    """Any word of the field switches on, after a space or `=`, also what is no switch here."""
    for typed in (["--gradient_checkpointing", word], [f"--gradient-checkpointing={word}"]):
        assert resolve(typed).train.gradient_checkpointing
    assert resolve(["--load_in_4bit", word, "--lora-r", "4"]).quant.kind == "4bit"


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off"])
def test_words_against_a_switch(word: str) -> None:
    assert not resolve(
        ["--no-cache", "--gradient_checkpointing", word]
    ).train.gradient_checkpointing
    assert resolve([f"--fast={word}"]).speed.fast is False
    assert resolve(["--no-fast", word]).speed.fast is True
    assert resolve(["--fast", "--no-fast"]).speed.fast is False, "the last one is an edit"
    assert resolve(["--load_in_4bit", word]).quant.kind == "none"


def test_a_recipe_after_a_list_is_no_value(tmp_path: Path) -> None:
    recipe = tmp_path / "some.yaml"
    recipe.write_text("train: {seed: 3}\n")
    config = resolve(["--target_modules", "q_proj", "v_proj", str(recipe)])
    assert (config.train.seed, config.method.model_dump()["target_modules"]) == (
        3, ["q_proj", "v_proj"],
    )  # fmt: skip
    config = resolve(["--dataset", "a.csv", "b.csv", str(recipe)])
    assert (config.data.dataset, config.data.also, config.train.seed) == ("a.csv", ("b.csv",), 3)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--max-length 2k", "--max-length 2k: numbers are written out. Did you mean 2048 or 2000?"),
        ("--max_steps 1.5k", "Did you mean 1536 or 1500?"),
        ("--lora_rnk 8", "No such option: --lora-rnk. Did you mean '--lora-rank'?"),
        ("--max-generate-samples 5", "a field: --set train.max_generate_samples=VALUE."),
        ("--streaming perhaps.yaml2 --fast=perhaps", "'perhaps' is neither true nor false"),
        ("--load_in_4bit --load_in_8bit", "--load-in-4bit and --load-in-8bit both set quant.kind"),
        ("--bf16 false", "Add --dtype float32: auto selects bfloat16 if the device supports it."),
        ("--load_in_4bit false --quant 4bit", "--load-in-4bit false contradicts quant.kind"),
        ("--packing --no-fast", "--packing contradicts speed.fast, which is False. Drop --no-fast"),
        ("--use_peft --method full", "contradicts method.kind, which is full. Drop one of them."),
        ("--do_train false", "ftlevel evaluate scores without training."),
        ("--eval_steps 5 --eval_strategy epoch", "--eval-steps 5 is not used by --eval-strategy"),
        ("--validation_file a --val_size 0.1", "Use one of them."),
        ("--run_name a --output_dir b", "leave it unused. Drop it."),
        ("--warmup_ratio 2", "a ratio is below 1; --warmup-steps N takes a number of steps."),
        ("--resume_from_checkpoint out/checkpoint-5", "Use: --output-dir RUN --resume."),
        (
            "--no-cache false --no-cache --fast --fast false --gradient_checkpointing maybe.yml2",
            "maybe.yml2 is neither a recipe nor the directory of a run.",
        ),
        ("faq.csv", "Use: ftlevel train --dataset faq.csv"),
        ("runs/nothing", "is neither a recipe nor the directory of a run."),
    ],
)
def test_mistakes_are_one_line(typed: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *shlex.split(typed), "--dry-run"]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert line in shown


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--deepspeed", "ds.json", "--use_galore", "--max-length", "2k"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_switches_of_what_is_not_here_may_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve(["--push_to_hub", "false", "--torch_compile=False"]) == resolve([])
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "--push-to-hub false: nothing is uploaded",
        "--torch-compile False: it is not available",
    ]


@pytest.mark.parametrize(
    ("typed", "sets", "said"),
    [
        ("--task ner", {"task": "token-classification"}, "'ner' is an alias"),
        ("--task QA", {"task": "question-answering"}, "'QA' is an alias"),
        ("--task chat", {"task": "text-generation"}, "'chat' is an alias"),
        ("--task SEQ_CLS", {"task": "text-classification"}, "'SEQ_CLS' is an alias"),
        ("--task CAUSAL_LM", {"task": "text-generation"}, "'CAUSAL_LM' is an alias"),
        ("--task classification", {"task": "text-classification"}, "an alias"),
        ("--method LoRA", {"method.kind": "lora"}, ""),
        ("--method dora", {"method.kind": "lora", "method.use_dora": True}, "'dora' is an alias"),
        ("--method prefix_tuning", {"method.kind": "prefix"}, "an alias"),
        ("--quant 4", {"quant.kind": "4bit"}, "'4' is an alias"),
        ("--quant int8", {"quant.kind": "8bit"}, "'int8' is an alias"),
        ("--quant FP4", {"quant.kind": "4bit", "quant.quant_type": "fp4"}, "quant_type=fp4"),
        ("--set quant=nf4", {"quant.kind": "4bit", "quant.quant_type": "nf4"}, "is an alias"),
    ],
)
def test_words_of_the_field(
    typed: str, sets: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(shlex.split(typed))
    assert {path: field_of(config, path) for path in sets} == sets
    lines = capsys.readouterr().err
    assert said in lines if said else lines == ""


def test_a_word_gives_way_to_what_is_given() -> None:
    config = resolve(["--method", "dora", "--no-dora"])
    assert field_of(config, "method.use_dora") is False


def test_a_dry_run_prints_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--lora_rank", "4", "--lr", "1e-3", "--weight_decay", "0.1", "--max_samples", "8"]
    assert run(["train", *typed, "--max_length", "64", "--overlong", "drop", "--json",
                "--dry-run"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert {"dry_run", "steps", "data", "targets"} < set(found)
    config = found["config"]
    assert config["method"]["r"] == 4
    assert (config["train"]["learning_rate"], config["train"]["weight_decay"]) == (1e-3, 0.1)
    assert (config["data"]["max_samples"], config["data"]["max_length"]) == (8, 64)
    assert config["model"]["dtype"] != "auto", "what ftlevel chose is there too"
    assert TrainConfig.model_validate({**config, "output": {}})


def test_three_quarters_are_accepted() -> None:
    accepted = sum(row.is_accepted for row in SPELLINGS)
    assert len(SPELLINGS) >= 150
    assert accepted >= 0.75 * len(SPELLINGS)
    assert all(bool(row.sets) + bool(row.agrees) + bool(row.answer) == 1 for row in SPELLINGS)
    doubles = Counter((row.tool, row.typed) for row in SPELLINGS)
    assert [key for key, count in doubles.items() if count > 1] == []
