"""Recipes, --set values and flags form one configuration, or an error that names its source."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest

from ftlevel.config import Layer, TrainConfig, build_config, load_recipe, parse_overrides, put
from ftlevel.config.flags import FLAGS, recipe_hint
from ftlevel.errors import ConfigError
from ftlevel.extras.preference.config import PreferenceConfig
from ftlevel.extras.rl.config import RlConfig


def get_problems(*layers: Layer) -> list[str]:
    with pytest.raises(ConfigError) as error:
        build_config(layers)
    return error.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence_of_flags_set_recipe_and_defaults(tmp_path):
    recipe = load_recipe(
        write(tmp_path / "r.yaml", "method: {kind: lora, r: 2, lora_alpha: 3}\ntrain: {seed: 1}\n")
    )
    settings = parse_overrides(["method.r=4", "train.seed=2"])
    flags = Layer()
    put(flags, ("train", "seed"), 3, "--seed")
    config = build_config([recipe, settings, flags])
    assert (config.method.r, config.method.lora_alpha, config.train.seed) == (4, 3.0, 3)
    assert config.train.num_train_epochs == 3.0  # the default


def test_section_shorthand_sets_first_field(tmp_path):
    recipe = write(tmp_path / "r.yaml", "model: gpt2\nmethod: qlora\ndata: rows.jsonl\n")
    config = build_config([load_recipe(recipe), parse_overrides(["method.r=5"])])
    assert (config.model.name_or_path, config.data.dataset) == ("gpt2", "rows.jsonl")
    assert (config.method.kind, config.method.r) == ("qlora", 5)


def test_task_alias_and_section_shorthand_are_combined(tmp_path):
    recipe = load_recipe(write(tmp_path / "r.yaml", "task: grpo\nrl: exact\n"))
    config = build_config([recipe])
    assert (config.task, config.rl.loss, config.rl.reward) == ("rl", "grpo", ("exact",))
    as_object = TrainConfig(task="grpo", rl=RlConfig(reward="exact"))
    assert (as_object.rl.loss, as_object.rl.reward) == ("grpo", ("exact",))


@pytest.mark.parametrize("task", ["reward", "preference"])
def test_preference_section_may_be_an_object(task):
    section = PreferenceConfig(loss="reward" if task == "preference" else None, center=0.1)
    config = TrainConfig(task=task, preference=section)
    assert (config.task, config.preference.loss) == ("reward", "reward")
    assert config.preference.center == 0.1


@pytest.mark.parametrize(
    "settings",
    [
        ["method.r=4", "method=lora", "method={lora_alpha: 3}"],
        ["method={r: 4, lora_alpha: 5}", "method=lora", "method.lora_alpha=3"],
        ["method={kind: lora, r: 4}", "method={lora_alpha: 3}"],
    ],
)
def test_settings_of_a_section_are_merged_in_any_order(settings):
    method = build_config([parse_overrides(settings)]).method
    assert (method.kind, method.r, method.lora_alpha) == ("lora", 4, 3.0)


def test_error_in_a_mapping_names_its_set_flag():
    recipe = Layer({"method": {"r": 2}}, {("method", "r"): "r.yaml:1"})
    problems = get_problems(recipe, parse_overrides(["method={r: 0}"]))
    assert problems == ["--set method: 0 is out of range: method.r must be ≥ 1."]


def test_rows_of_a_dataset_dict_stay_one_object(tmp_path):
    rows = OrderedDict(train=[{"text": "a"}])  # a dict subclass, as DatasetDict
    layer = Layer()
    put(layer, ("data", "dataset"), rows, "dataset")
    recipe = load_recipe(write(tmp_path / "r.yaml", "data: {dataset: rows.csv}\n"))
    config = build_config([recipe, layer])
    assert getattr(config.data.dataset, "rows", None) is rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding": {"guide": "x"}}, "--guide has no effect with --loss mnrl: it is for gist."),
        ({"embedding": {"temperature": 2}},
         "--temperature has no effect with --loss mnrl: it is for kl."),
        ({"distillation": "x"},
         "--teacher has no effect with --loss mnrl: it is for margin-mse, kl."),
    ],
)  # fmt: skip
def test_parameters_of_another_embedding_loss_are_rejected(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(task="embedding", **fields)
    # All default losses: mnrl, cosent, and contrastive for classes.
    assert TrainConfig(task="embedding", embedding={"scale": 3, "symmetric": True, "margin": 0.3})


def test_settings_without_effect_are_listed():
    config = TrainConfig(
        task="text-classification",
        data={"doc_stride": 64, "labels": ("a", "b"), "max_target_length": 9},
        train={"num_beams": 2},
    )
    messages = list(config.list_unused("decoder"))
    names = [message.partition(" has no effect with ")[0] for message in messages]
    assert names == ["train.num_beams", "data.doc_stride", "data.max_target_length"]
    assert messages[2] == (
        "data.max_target_length has no effect with --task text-classification and a decoder: it is "
        "for encoder-decoder. Drop it."
    )
    assert not list(TrainConfig(train={"num_beams": 2}).list_unused("decoder"))


def test_qlora_defaults_to_4bit():
    assert build_config([parse_overrides(["method=qlora"])]).quant.kind == "4bit"
    assert build_config([parse_overrides(["method=qlora", "quant=8bit"])]).quant.kind == "8bit"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method:\n  kind: lora\n  rank: 3\n",
         "{path}:3: unknown key 'method.rank'. Did you mean 'method.r'?"),
        ("train:\n  learning_rat: 1\n",
         "{path}:2: unknown key 'train.learning_rat'. Did you mean 'train.learning_rate'?"),
        ("method: lorra\n",
         "{path}:1: 'lorra' is not known. Expected one of {methods}. Did you mean 'lora'?"),
        ("quant: 4bti\n",
         "{path}:1: '4bti' is not known. Expected one of none, 4bit, 8bit. Did you mean '4bit'?"),
        ("method:\n  kind: full\n  r: 8\n",
         "{path}:3: 'method.r' belongs to method {owners}, and the method is full."),
        ("train:\n  max_steps: 1.5\n",
         "{path}:2: 1.5 cannot be used for train.max_steps. Expected an integer."),
        ("data:\n  max_length: long\n",
         "{path}:2: 'long' cannot be used for data.max_length. Expected an integer."),
    ],
)  # fmt: skip
def test_recipe_error_names_line_and_suggests_key(tmp_path, text, message):
    from ftlevel.config import SPECS

    path = write(tmp_path / "r.yaml", text)
    owners = ", ".join(name for name, spec in SPECS.items() if "r" in spec.model_fields)
    expected = message.format(path=path, methods=", ".join(SPECS), owners=owners)
    assert get_problems(load_recipe(path)) == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "{path}:2: not valid YAML (expected ',' or ']', but got '<stream end>'). A "
                    "recipe contains plain values: text, numbers, lists and mappings."),
        ("- 1\n", "{path}:1: a recipe is a mapping of sections, such as method: lora."),
        ("", "recipe {path} is empty. Add at least one section, such as method."),
        ("train:\n  seed: 1\n  seed: 2\n",
         "{path}:3: key 'train.seed' is given twice, first at {path}:2."),
        ("task: x\ntrain: !!python/object:os.system {}\n",
         "{path}:2: not valid YAML (could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object:os.system'). A recipe contains plain values: text, "
         "numbers, lists and mappings."),
        ("\x01\n", "{path}: not valid YAML (unacceptable character #x0001: special characters "
         "are not allowed). A recipe contains plain values: text, numbers, lists and mappings."),
    ],
)  # fmt: skip
def test_invalid_recipe_raises(tmp_path, text, message):
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert str(error.value) == message.format(path=path)


def test_missing_recipe_suggests_similar_name(tmp_path):
    write(tmp_path / "demo.yaml", "method: lora\n")
    with pytest.raises(ConfigError, match=r"demmo.yaml does not exist. Did you mean '.*demo.yaml'"):
        load_recipe(tmp_path / "demmo.yaml")


@pytest.mark.parametrize("setting", ["train.seed", "=3", "train.seed=[1"])
def test_malformed_set_value_raises(setting):
    with pytest.raises(ConfigError, match=f"--set {setting.split('=')[0]}") as error:
        parse_overrides([setting])
    assert "[1" not in str(error.value), "a value may be a secret"


def test_all_problems_are_reported_together():
    errors = get_problems(parse_overrides(["method.r=0", "train.learning_rate=2", "quant=3bit"]))
    assert errors == [
        "--set quant: '3bit' is not known. Expected one of none, 4bit, 8bit. Did you mean '8bit'?",
        "--set method.r: 0 is out of range: method.r must be ≥ 1.",
        "--set train.learning_rate: 2 is out of range: train.learning_rate must be ≤ 1.0.",
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "method.r=0", "method.r=-1", "method.lora_dropout=1", "method.lora_dropout=-0.1",
        "method.lora_alpha=0", "method.target_modules=[]", "method.target_modules='(a'",
        "train.learning_rate=0", "train.learning_rate=-1", "train.learning_rate=.nan",
        "train.learning_rate=.inf", "train.learning_rate=1.1", "train.num_train_epochs=0",
        "train.per_device_train_batch_size=0", "train.gradient_accumulation_steps=0",
        "train.max_steps=0", "train.seed=-1", "data.max_length=0", "data.validation_split=1",
        "data.max_samples=0", "model.name_or_path=''", "data.dataset=''",
    ],
)  # fmt: skip
def test_out_of_range_values_raise(setting):
    key = setting.partition("=")[0]
    assert get_problems(parse_overrides([setting]))[0].startswith(f"--set {key}: ")


@pytest.mark.parametrize(
    "setting",
    ["train.seed=yes", "train.learning_rate=on", "method.r=true", "method.lora_dropout=no",
     "data.max_length=true", "data.mix=yes", "train.save_steps=on", "model.name_or_path=no",
     "output.dir=true", "method.target_modules=yes"],
)  # fmt: skip
def test_boolean_is_not_accepted_as_number(setting):
    """YAML reads `yes` as true, which equals 1 in Python."""
    (errors,) = get_problems(parse_overrides([setting]))
    assert errors.startswith(f"--set {setting.partition('=')[0]}: ")
    assert build_config([parse_overrides(["train.eval_on_start=yes"])]).train.eval_on_start


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trian.seed=4", "unknown key 'trian.seed'. Did you mean 'train.seed'?"),
        ("seed=4", "unknown key 'seed'. Did you mean 'train.seed'?"),
        ("train.max_length=4", "unknown key 'train.max_length'. Did you mean 'data.max_length'?"),
        ("train.r=4", "unknown key 'train.r'. Did you mean 'method.r'?"),
        ("data.column={a: b}", "unknown key 'data.column'. Did you mean 'data.columns'?"),
        ("data.mixx={}", "unknown key 'data.mixx'. Did you mean 'data.mix'?"),
        ("foo.bar=4", "unknown key 'foo.bar'. Sections: task, model, quant, method, data, train, "
         "distillation, speed, output, preference, embedding, reranking, rl."),
        ("train.optim=adamw", "'adamw' is not known. Expected one of adamw_torch, "
         "adamw_torch_fused, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, adafactor, ademamix, "
         "ademamix_8bit, paged_ademamix_8bit, paged_ademamix_32bit, lion_8bit, lion_32bit, "
         "paged_lion_8bit, paged_lion_32bit, rmsprop, adagrad, sgd. Did you mean 'adamw_torch'?"),
    ],
)  # fmt: skip
def test_unknown_key_error_suggests_similar_key(setting, message):
    key = setting.partition("=")[0]
    assert get_problems(parse_overrides([setting])) == [f"--set {key}: {message}"]


def test_empty_mapping_keeps_earlier_values():
    config = build_config([parse_overrides(["train.seed=3", "train={}", "data.columns={}"])])
    assert config.train.seed == 3
    assert config.data.columns == {}


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        (["method=dora"], ["method=lora"], {"kind": "lora"}),
        (["method=dora"], ["method.kind=qlora", "quant=4bit"], {"kind": "qlora"}),
        (["method=pissa"], ["method=rslora"], {"kind": "lora", "use_rslora": True}),
        (["method=pissa"], ["method=ia3"], {"kind": "ia3"}),
        (["method=dora"], ["method.r=4"], {"kind": "lora", "use_dora": True, "r": 4}),
        (["method={kind: lora, use_dora: true}"], ["method=lora"],
         {"kind": "lora", "use_dora": True}),
    ],
)  # fmt: skip
def test_later_method_replaces_fields_of_alias(recipe, override, expected):
    config = build_config([parse_overrides(recipe), parse_overrides(override)])
    assert config.method.model_dump(exclude_unset=True) == expected


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_r", "Did you mean 'method.r'?"),
        ("method.lora_r", "Did you mean 'method.r'?"),
        ("micro_batch_size", "Did you mean 'train.per_device_train_batch_size'?"),
        ("train.num_epochs", "Did you mean 'train.num_train_epochs'?"),
        ("lora_target_linear", "Did you mean 'method.target_modules: all-linear'?"),
        ("sample_packing", "It is a flag of the command line, not a key: --sample-packing."),
    ],
)
def test_flag_name_in_recipe_suggests_key(key, hint):
    [problem] = get_problems(parse_overrides([f"{key}=1"]))
    assert problem == f"--set {key}: unknown key {key!r}. {hint}"


def test_every_flag_name_has_recipe_hint():
    rows = [row for row in FLAGS if "train" in row.on and row.path and not row.is_argument]
    names = [name for row in rows for name in (row.name, *(o.name for o in row.alias_names))]
    unknown = [name for name in names if "Did you mean" not in recipe_hint(name.lstrip("-"))]
    assert len(names) > 300
    assert unknown == []


def test_invalid_section_value_raises_despite_flag():
    flags = parse_overrides(["train.max_steps=3"])
    with pytest.raises(ConfigError, match=r"--set train: train is a section and got 4"):
        build_config([parse_overrides(["train=4"]), flags])


def test_target_modules_accept_names_or_pattern():
    def parse(value: str) -> object:
        return build_config([parse_overrides([f"method.target_modules={value}"])]).method

    assert parse("a, b").target_modules == ["a", "b"]
    assert parse("q_proj").target_modules == ["q_proj"]
    assert parse("all-linear").target_modules == "all-linear"
    assert parse(r"'.*\.q_proj'").target_modules == r".*\.q_proj"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{chr(ord(n) - 1)}'] * 9)}]\n" for n in "bcdefgh"
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "a: &a [*a]", "task: !!int x", "task: !!bool x", "task: !!timestamp x", "a: !!float x",
     f"task: {'9' * 6000}", "[" * 5_000, "a: " + "{b: " * 3_000, "? [a]\n: 1", "!!binary x: 1",
     r'task: "\ud800"'],
)  # fmt: skip
def test_malicious_yaml_raises_one_line_error(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path / "r.yaml", text))
    assert "r.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_dates_are_strings_and_anchors_are_accepted(tmp_path):
    text = "data: &d\n  dataset: 2024-13-45\nmodel: {name_or_path: 2024-01-02}\ntrain: {seed: 3}\n"
    assert load_recipe(write(tmp_path / "r.yaml", text)).values == {
        "data": {"dataset": "2024-13-45"}, "model": {"name_or_path": "2024-01-02"},
        "train": {"seed": 3},
    }  # fmt: skip


def test_recipe_that_is_a_pipe_raises(tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match=r"is not a file"):
        load_recipe(tmp_path / "r.yaml")
