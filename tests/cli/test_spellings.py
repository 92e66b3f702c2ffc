"""Other tools' flags: each takes effect, matches the default behaviour, or is rejected."""

from __future__ import annotations

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
from command_line import Cli
from ftlevel.cli.flags import CommandInput, add_command, read_config
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError

_CONFIGS: list[TrainConfig] = []


@cache
def _build_parser() -> Any:
    def command(inputs: CommandInput) -> None:
        _CONFIGS.append(read_config(inputs)[0])

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, FLAGS)
    return get_command(app)


def resolve(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration of a `train` command line."""
    _build_parser()(args=list(arguments), standalone_mode=False)
    return _CONFIGS.pop()


@cache
def resolve_without(extra: str) -> TrainConfig:
    """Return the configuration of the further flags of a row, without its own."""
    return resolve(shlex.split(extra))


def get_field(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None)  # the field may belong to another method
    if path == "output.dir":
        return str(value)
    return list(value) if isinstance(value, tuple) else value


ACCEPTED = [row for row in SPELLINGS if row.sets]
AGREEING = [row for row in SPELLINGS if row.agrees]
REJECTED = [row for row in SPELLINGS if row.answer]


def _names(rows: Sequence[ForeignFlag]) -> list[str]:
    return [f"{row.tool}: {row.typed}" for row in rows]


@pytest.mark.parametrize("row", ACCEPTED, ids=_names(ACCEPTED))
def test_foreign_flag_sets_fields(row: ForeignFlag) -> None:
    config = resolve([*shlex.split(row.typed), *shlex.split(row.extra)])
    defaults = resolve_without(row.extra)
    for path, value in row.sets.items():
        assert get_field(config, path) == value
        assert get_field(defaults, path) != value


@pytest.mark.parametrize("row", AGREEING, ids=_names(AGREEING))
def test_foreign_flag_without_effect_prints_reason(
    row: ForeignFlag, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = shlex.split(row.typed)
    assert resolve(typed) == resolve_without("")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {typed[0].replace('_', '-')}")
    assert row.agrees in line


@pytest.mark.parametrize("row", REJECTED, ids=_names(REJECTED))
def test_foreign_flag_is_rejected_with_reason(row: ForeignFlag) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(shlex.split(row.typed))
    (line,) = error.value.problems
    assert row.answer in line
    assert "\n" not in line
    assert error.value.exit_code == 2


def test_coming_from_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_docs.main(["coming-from", "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on"])
def test_true_words_switch_on(word: str) -> None:
    """Any boolean word switches on, after a space or `=`, even for flags without a value here."""
    for typed in (["--gradient_checkpointing", word], [f"--gradient-checkpointing={word}"]):
        assert resolve(typed).train.gradient_checkpointing
    assert resolve(["--load_in_4bit", word, "--lora-r", "4"]).quant.kind == "4bit"


@pytest.mark.parametrize("word", ["false", "False", "0", "no", "off"])
def test_false_words_switch_off(word: str) -> None:
    assert not resolve(
        ["--no-cache", "--gradient_checkpointing", word]
    ).train.gradient_checkpointing
    assert resolve([f"--fast={word}"]).speed.fast is False
    assert resolve(["--no-fast", word]).speed.fast is True
    assert resolve(["--fast", "--no-fast"]).speed.fast is False, "the last one is an edit"
    assert resolve(["--load_in_4bit", word]).quant.kind == "none"


def test_recipe_after_list_is_not_a_list_value(tmp_path: Path) -> None:
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
        ("--max-generate-samples 5", "is a field, not a flag: --set train.max_generate_samples="),
        ("--cache perhaps.yaml2 --fast=perhaps", "'perhaps' is neither true nor false"),
        ("--load_in_4bit --load_in_8bit", "--load-in-4bit and --load-in-8bit both set quant.kind"),
        ("--bf16 false", "Add --dtype float32: auto selects bfloat16 if the device supports it."),
        ("--load_in_4bit false --quant 4bit", "--load-in-4bit false contradicts quant.kind"),
        ("--packing --no-fast", "--packing contradicts speed.fast, which is False. Drop --no-fast"),
        ("--use_peft --method full", "contradicts method.kind, which is full. Drop one of them."),
        ("--do_train false", "ftlevel evaluate scores without training."),
        (
            "--eval_steps 5 --eval_strategy epoch",
            "--eval-steps 5 has no effect with --eval-strategy",
        ),
        ("--validation_file a --val_size 0.1", "both define the validation rows."),
        ("--run_name a --output_dir b", "--run-name a has no effect with --output-dir b"),
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
def test_invalid_flags_print_one_line(typed: str, line: str, cli: Cli) -> None:
    (error,) = cli.fails("train", *shlex.split(typed), "--dry-run").splitlines()
    assert line in error


def test_all_problems_are_reported_together(cli: Cli) -> None:
    error = cli.fails("train --deepspeed ds.json --use_galore --max-length 2k")
    assert len(error.splitlines()) == 3


def test_unsupported_switch_may_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve(["--push_to_hub", "false", "--torch_compile=False"]) == resolve([])
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "--push-to-hub false: nothing is uploaded",
        "--torch-compile False: it is not available",
    ]


@pytest.mark.parametrize(
    ("typed", "sets", "note"),
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
def test_value_aliases(
    typed: str, sets: dict[str, Any], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(shlex.split(typed))
    assert {path: get_field(config, path) for path in sets} == sets
    lines = capsys.readouterr().err
    assert note in lines if note else lines == ""


def test_explicit_flag_overrides_method_alias() -> None:
    config = resolve(["--method", "dora", "--no-dora"])
    assert get_field(config, "method.use_dora") is False


def test_dry_run_prints_full_configuration(cli: Cli) -> None:
    typed = ["--lora_rank", "4", "--lr", "1e-3", "--weight_decay", "0.1", "--max_samples", "8"]
    result = cli.json("train", *typed, "--max_length 64 --overlong drop --json --dry-run")
    assert {"dry_run", "steps", "data", "targets"} < set(result)
    config = result["config"]
    assert config["method"]["r"] == 4
    assert (config["train"]["learning_rate"], config["train"]["weight_decay"]) == (1e-3, 0.1)
    assert (config["data"]["max_samples"], config["data"]["max_length"]) == (8, 64)
    assert config["model"]["dtype"] != "auto", "what ftlevel chose is there too"
    assert TrainConfig.model_validate({**config, "output": {}})


def test_at_least_three_quarters_are_accepted() -> None:
    accepted = sum(row.is_accepted for row in SPELLINGS)
    assert len(SPELLINGS) >= 150
    assert accepted >= 0.75 * len(SPELLINGS)
    assert all(bool(row.sets) + bool(row.agrees) + bool(row.answer) == 1 for row in SPELLINGS)
    counts = Counter((row.tool, row.typed) for row in SPELLINGS)
    assert [key for key, count in counts.items() if count > 1] == []
