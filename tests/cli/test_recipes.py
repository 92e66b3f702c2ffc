"""`ftlevel recipes`, and other tools' configuration files given as a recipe."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from command_line import Cli
from ftlevel.config import TrainConfig, build_config, load_recipe

pytestmark = pytest.mark.usefixtures("work_dir")

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
AXOLOTL, LLAMA_FACTORY, TRL_GRPO, MS_SWIFT_GRPO, AXOLOTL_GRPO, VERL = (
    (Path(__file__).parent / f"other_tools/{name}.yml").read_text()
    for name in ("axolotl", "llama_factory", "trl_grpo", "ms_swift_grpo", "axolotl_grpo", "verl")
)


def convert(text: str, cli: Cli) -> tuple[TrainConfig, dict[str, str]]:
    """Convert `text`; return the loaded recipe and the keys that were not converted."""
    Path("theirs.yml").write_text(text)
    captured = cli.run("recipes convert theirs.yml")
    Path("ours.yaml").write_text(captured.out)
    unconverted = [line.removeprefix("# Not converted: ") for line in captured.out.splitlines()
                   if line.startswith("# Not converted: ")]  # fmt: skip
    assert all(f"note: not converted: {line}" in captured.err.splitlines() for line in unconverted)
    pairs = (line.partition(": ") for line in unconverted)
    recipe = build_config([load_recipe(Path("ours.yaml"))], runs=False)
    return recipe, {key: reason for key, _, reason in pairs}


def test_convert_axolotl(cli: Cli) -> None:
    config, unconverted = convert(AXOLOTL, cli)
    assert config.model.name_or_path == "some/model"
    assert (config.method.kind, config.quant.kind) == ("qlora", "4bit")
    assert config.method.model_dump()["target_modules"] == ["q_proj", "v_proj"]
    assert (config.data.dataset, config.data.format) == ("a.jsonl", "alpaca")
    assert (config.data.max_length, config.data.validation_split) == (1024, 0.1)
    assert (config.train.eval_steps, config.train.save_strategy) == (0.125, "epoch")
    assert str(config.output.dir) == "out"
    assert unconverted.keys() == {
        "datasets[0].shards", "optimizer", "special_tokens", "made_up_key",
    }  # fmt: skip
    assert "'galore_adamw': it projects gradients of full weights" in unconverted["optimizer"]


def test_convert_llama_factory(cli: Cli) -> None:
    config, unconverted = convert(LLAMA_FACTORY, cli)
    assert (config.method.kind, config.quant.kind) == ("lora", "4bit")
    assert config.method.model_dump()["target_modules"] == "all-linear"
    assert (config.data.dataset, config.data.also) == ("identity", ("alpaca_en_demo",))
    assert (config.data.max_length, config.model.dtype) == (2048, "bfloat16")
    assert unconverted.keys() == {"template", "ddp_timeout", "dataset"}
    assert "identity, alpaca_en_demo" in unconverted["dataset"]


@pytest.mark.parametrize(
    ("text", "kind", "alpha"),
    [
        ("base_model: some/model\nadapter:\nlora_r: 32", "full", None),
        ("model_name_or_path: some/model\ndataset_name: a.jsonl", "full", None),
        ("model_name_or_path: some/model\ndataset_name: a.jsonl\nuse_peft: true", "lora", 32),
        ("model_name_or_path: some/model\nstage: sft\nlora_rank: 16", "lora", 32),
        ("model_name_or_path: some/model\nfinetuning_type: full\nlora_rank: 16", "full", None),
        ("model: some/model\ntrain_type: lora\nlora_rank: 16", "lora", 32),
    ],
)
def test_convert_keeps_the_defaults_of_the_method(
    text: str, kind: str, alpha: float | None, cli: Cli
) -> None:
    config, unconverted = convert(text, cli)
    method = config.method.model_dump()
    assert (method["kind"], method.get("lora_alpha")) == (kind, alpha)
    assert unconverted.keys() <= {"lora_r", "lora_rank"}, "no dataset was named"


def test_scheduler_arguments_and_several_invalid_keys(cli: Cli) -> None:
    """A rule between fields is checked only once each field is valid."""
    text = """
model_name_or_path: some/model
stage: sft
save_steps: 0
learning_rate: 1.0e-4
lr_scheduler_type: cosine_with_min_lr
"""
    _, unconverted = convert(text, cli)
    assert unconverted.keys() == {"save_steps", "lr_scheduler_type"}
    assert "needs one of min_lr or min_lr_rate" in unconverted["lr_scheduler_type"]
    config, unconverted = convert(f"{text}lr_scheduler_kwargs: {{min_lr_rate: 0.1}}", cli)
    assert unconverted.keys() == {"save_steps"}
    assert config.train.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    text = "base_model: some/model\nadapter: lora\nchat_template: "
    assert convert(f"{text}llama3", cli)[0].data.chat_template == "llama-3"
    config, unconverted = convert(f"{text}tokenizer_default", cli)
    assert config.data.chat_template is None
    assert "the model's chat template is used" in unconverted["chat_template"]


def test_each_key_is_not_converted_for_its_own_reason(cli: Cli) -> None:
    _, unconverted = convert(
        """
base_model: some/model
adapter: lora
datasets: [{path: a.jsonl, type: alpaca}, {path: b.jsonl, type: completion}]
excess_length_strategy: truncate
evals_per_epoch: 1
eval_steps: 50
""",
        cli,
    )
    assert {"datasets[1].type", "excess_length_strategy", "evals_per_epoch"} == set(unconverted)
    assert "--overlong truncate" in unconverted["excess_length_strategy"]
    assert "--eval-strategy epoch" in unconverted["evals_per_epoch"]


@pytest.mark.parametrize(("text", "tool"), [(AXOLOTL, "Axolotl"), (LLAMA_FACTORY, "LLaMA-Factory")])
def test_unconverted_configuration_is_rejected(text: str, tool: str, cli: Cli) -> None:
    Path("theirs.yml").write_text(text)
    error = cli.fails("train --recipe theirs.yml")
    assert error == (
        f"ftlevel: theirs.yml is a configuration of {tool}. Write it as a recipe first: "
        "ftlevel recipes convert theirs.yml > recipe.yaml  [settings]\n"
    )


def test_convert_trl_grpo_and_verl(cli: Cli) -> None:
    config, unconverted = convert(TRL_GRPO, cli)
    assert (config.task, config.rl.reward) == ("rl", ("math", "format:think"))
    assert (config.rl.loss, config.rl.scale) == ("dr_grpo", "group")
    assert config.train.per_device_train_batch_size == 2  # prompts, of 16 completions
    assert not unconverted
    config, unconverted = convert(VERL, cli)
    assert (config.task, config.rl.reward, config.rl.loss) == ("rl", ("number",), "dapo")
    assert (config.rl.clip, config.rl.scale, config.rl.beta) == ((0.2, 0.28), "none", 0.001)
    assert (config.rl.num_generations, config.rl.temperature) == (4, 0.8)
    assert config.train.per_device_train_batch_size == 64
    assert (config.data.max_length, config.train.num_train_epochs) == (512 + 256, 30)
    assert (config.method.kind, config.train.learning_rate) == ("lora", 1e-6)
    assert "verl chooses a function by data_source" in unconverted["reward_model"]
    assert unconverted.keys() == {"reward_model", "actor_rollout_ref.actor.ppo_mini_batch_size"}
    full, unconverted = convert(VERL.replace(", lora_rank: 16", "").replace("16", "64"), cli)
    assert full.method.kind == "full"
    assert unconverted.keys() == {"reward_model"}
    ppo = VERL.replace("adv_estimator: grpo, ", "").replace(
        "actor:", "actor:\n    policy_loss: {loss_mode: clip_cov}"
    )
    _, unconverted = convert(ppo.replace("16", "64"), cli)
    assert {
        "algorithm.adv_estimator",
        "actor_rollout_ref.actor.policy_loss.loss_mode",
    } < unconverted.keys()
    other = VERL.replace("ppo_mini_batch_size: 16", "loss_agg_mode: seq-mean-token-sum")
    _, unconverted = convert(other, cli)
    assert {  # verl's default is 256 prompts
        "actor_rollout_ref.actor.loss_agg_mode",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
    } < unconverted.keys()
    config, unconverted = convert(MS_SWIFT_GRPO, cli)
    assert (config.rl.loss, config.rl.beta, config.rl.temperature) == ("grpo", 0.04, 0.9)
    assert config.data.max_length == 128 + 64
    batch = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    assert batch == (1, 2)  # ms-swift accumulates to 16 completions
    assert not unconverted
    score = re.compile(config.rl.reward[1].removeprefix("regex:")).search
    assert score("<think>a\nb</think>\n<answer>c\nd</answer>")
    assert not score("<think>a</think><answer>b</answer> c")
    Path("scores.py").write_text("def short(completions, **_): ...\n")
    config, unconverted = convert(AXOLOTL_GRPO, cli)
    assert (config.task, config.rl.reward) == ("rl", ("scores.py:short",))
    assert config.train.per_device_train_batch_size == 2  # prompts, of 4 completions
    assert unconverted.keys() == {"trl.reward_weights"}


def test_reward_without_counterpart_is_named(cli: Cli) -> None:
    Path("theirs.yml").write_text(MS_SWIFT_GRPO.replace("[accuracy, format]", "[cosine]"))
    assert "reward_funcs: 'cosine' has no counterpart" in cli.fails("recipes convert theirs.yml")


def test_reward_function_in_a_script_must_be_named(cli: Cli) -> None:
    without = TRL_GRPO.replace("reward_funcs: [accuracy_reward, think_format_reward]\n", "")
    Path("theirs.yml").write_text(without)
    assert "reward_funcs: [MODULE.FUNCTION]" in cli.fails("recipes convert theirs.yml")
    Path("scores.py").write_text("def short(completions, **_): ...\n")
    config, _ = convert(f"{without}reward_funcs: [scores.short]\n", cli)
    assert (config.task, config.rl.loss) == ("rl", "dr_grpo")
    assert config.rl.reward == ("scores.py:short",)


def test_list_show_and_copy(cli: Cli) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("# What I do.\nmethod: lora\n")
    first, *shipped = cli("recipes list").splitlines()
    assert first.split(maxsplit=1) == ["recipes/mine.yaml", "What I do."]
    assert [line.split()[0] for line in shipped] == [path.stem for path in RECIPES]
    assert yaml.safe_load(cli("recipes show mine")) == {"method": "lora"}
    assert cli("recipes copy demo") == "wrote demo.yaml. Then: ftlevel train demo.yaml\n"
    assert Path("demo.yaml").read_bytes() == (RECIPES[0].parent / "demo.yaml").read_bytes()
    Path("demo.yaml").write_text("method: ia3\n")
    error = cli.fails("recipes copy recipes/mine.yaml demo.yaml")
    assert "Choose another: ftlevel recipes copy mine demo-2.yaml" in error
    assert Path("demo.yaml").read_text() == "method: ia3\n"
    Path("folder").mkdir()
    assert cli.json("recipes copy mine folder --json")["copied_to"] == "folder/mine.yaml"
    rows = cli.json("recipes list --json")["recipes"]
    assert {"name": "demo.yaml", "path": "demo.yaml", "about": ""} in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert recipes/mine.yaml", "ftlevel train recipes/mine.yaml"),
        ("convrt x", "Expected list, show, copy, convert. Did you mean 'convert'?"),
        ("show", "there is nothing to show"),
        ("show dmo", "there is no recipe dmo. Did you mean 'demo'? See: ftlevel recipes list"),
        ("show demo new.yaml", "only copy writes a file"),
        ("copy demo no/new.yaml", "no does not exist"),
    ],
)
def test_invalid_arguments_are_rejected(arguments: str, message: str, cli: Cli) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("method: lora\n")
    assert message in cli.fails("recipes", *arguments.split())


@pytest.mark.slow
def test_wheel_contains_recipes(tmp_path: Path) -> None:
    root = RECIPES[0].parents[1]
    build = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    process = subprocess.run(
        [sys.executable, "-c", build], cwd=root, capture_output=True, text=True, check=True
    )
    names = zipfile.ZipFile(tmp_path / process.stdout.split()[-1]).namelist()
    assert {f"ftlevel/recipes/{path.name}" for path in RECIPES} <= set(names)
