"""Rules between sections; sections are closed, frozen and have descriptions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from ftlevel.config import (
    SPECS,
    EvaluateConfig,
    MergeConfig,
    PredictConfig,
    TrainConfig,
    TrainerConfig,
    build_config,
    parse_overrides,
)
from ftlevel.config.flag import CONFIGS
from ftlevel.errors import ConfigError
from ftlevel.extras.serving.config import CheckServedConfig, ExportConfig

RULES = [
    (["method=full", "quant=4bit"],
     "--quant 4bit cannot be used with --method full: 4-bit weights receive no gradients. "
     "Use --method qlora, or drop --quant."),
    (["method=qlora", "quant=none"],
     "--method qlora needs a quantized base (--quant is none). Use --quant 4bit or 8bit, or "
     "--method lora."),
    (["quant.double_quant=true"],
     "--double-quant needs --quant 4bit (it is none). Add --quant 4bit, or drop --double-quant."),
    (["quant=8bit", "quant.quant_type=fp4"],
     "--quant-type fp4 needs --quant 4bit (it is 8bit). Add --quant 4bit, or drop --quant-type."),
    (["model.dtype=float16", "model.device=cpu"],
     "--dtype float16 cannot be used with --device cpu: the CPU computes it in software, and it "
     "overflows in training. Use --dtype bfloat16 or float32."),
    (["output.resume=true", "output.overwrite=true", "output.dir=x"],
     "--resume cannot be used with --overwrite: one keeps the run and the other replaces it. Drop "
     "one of them."),
    (["output.resume=true"],
     "--resume needs --output-dir RUN: it is the run to resume. Add --output-dir RUN, or drop "
     "--resume."),
    (["task=summarization", "data.overlong=truncate"],
     "--overlong truncate cannot be used with --task summarization. Use --overlong drop or "
     "truncate-prompt."),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), RULES)
def test_contradicting_sections_raise(settings, message):
    with pytest.raises(ConfigError) as error:
        build_config([parse_overrides(settings)])
    assert message in error.value.problems


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


@pytest.mark.parametrize("section", [*sections(TrainConfig), *SPECS.values()])
def test_sections_are_closed_frozen_and_described(section):
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"]
    for name, field in section.model_fields.items():
        assert field.description or name == "kind", f"{section.__name__}.{name}"
    assert section.__doc__


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, {"train": {"output_dir": "runs/x"}},
         "TrainConfig(train.output_dir): unknown key 'train.output_dir'. "
         "Did you mean 'output.dir'?"),
        (TrainConfig, {"lora_r": 4},
         "TrainConfig(lora_r): unknown key 'lora_r'. Did you mean 'method.r'?"),
        (TrainConfig, {"method": {"kind": "full", "use_dora": True}},
         "TrainConfig(method.use_dora): 'method.use_dora' belongs to method lora, qlora, and the "
         "method is full."),
        (TrainConfig, {"train": {"max_steps": 0}},
         "TrainConfig(train.max_steps): 0 is out of range: train.max_steps must be ≥ 1."),
        (TrainConfig, {"train": 3},
         "TrainConfig(train): train is a section and got 3. Set its fields, such as "
         "train.num_beams."),
        (TrainConfig, {"speed": [{"text": "a secret row"}]},
         "TrainConfig(speed): speed is a section and got a list. Set its fields, such as "
         "speed.fast."),
        (TrainerConfig, {"lr": 1}, "TrainerConfig(lr): unknown key 'lr'. "
         "Did you mean 'train.learning_rate'?"),
        (PredictConfig, {"name": "run", "datset": "x"},
         "PredictConfig(datset): unknown key 'datset'. Did you mean 'dataset'?"),
        (MergeConfig, {"adapters": ["run"], "output_dir": "x", "dtyp": "x"},
         "MergeConfig(dtyp): unknown key 'dtyp'. Did you mean 'dtype'?"),
        (MergeConfig, {"adapters": ["run"]}, "MergeConfig(output_dir): it is missing: Output "
         "directory of the merged model; it must not exist."),
        (EvaluateConfig, {"name": "run", "batch_size": 0},
         "EvaluateConfig(batch_size): 0 is out of range: batch_size must be ≥ 1."),
    ],
)  # fmt: skip
def test_invalid_constructor_argument_raises(section, values, message):
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert error.value.problems == [message]


@pytest.mark.parametrize("section", [*CONFIGS.values(), CheckServedConfig, *SPECS.values()])
def test_unknown_constructor_argument_raises_config_error(section):
    with pytest.raises(ConfigError, match=rf"{section.__name__}\(zzz\): unknown key 'zzz'"):
        section(zzz=1)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "name_or_path", "x"), ("data", "dataset", "x"), ("method", "kind", "ia3"),
     ("quant", "kind", "4bit"), ("output", "dir", Path("x")), ("distillation", "teacher", "x"),
     ("preference", "loss", "orpo")],
)  # fmt: skip
def test_string_for_section_sets_main_field(section, key, value):
    task = "preference" if section == "preference" else "text-generation"
    layers = [parse_overrides([f"task={task}", f"{section}={value}"])]
    for config in (TrainConfig(task=task, **{section: value}), build_config(layers)):
        assert getattr(getattr(config, section), key) == value


def test_dump_and_validate_roundtrip():
    config = build_config([parse_overrides(["method=qlora", "train.seed=7", "data.max_length=9"])])
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_schema_lists_methods_and_forbids_extra_keys():
    schema = TrainConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(SPECS)


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (TrainConfig, {"model": "a\0b"}, "model.name_or_path"),
        (TrainConfig, {"data": {"dataset": "x", "also": ["a\0b"]}}, "data.also"),
        (TrainConfig, {"data": {"chat_template": "a\0b"}}, "data.chat_template"),
        (TrainConfig, {"output": Path("a\0b")}, "output.dir"),
        (EvaluateConfig, {"name": "a\0b"}, "name"),
        (MergeConfig, {"adapters": ["a\0b"], "output_dir": "x"}, "adapters"),
    ],
)
def test_null_byte_in_name_raises(section, values, key):
    with pytest.raises(ConfigError, match=rf"\({key}\): .*a name cannot contain a null byte"):
        section(**values)
    assert TrainConfig(data={"system": "a\0b"}).data.system == "a\0b"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ExportConfig, {"model": "run", "format": "gguf-lora", "out": "x.gguf"},
         "ExportConfig(out): 'x.gguf': a directory is written, and x.gguf is the name of a file. "
         "Name it x."),
        (ExportConfig, {"model": "run", "server": "vllm", "out": "x.gguf"},
         "ExportConfig(out): 'x.gguf': a directory is written, and x.gguf is the name of a file. "
         "Name it x."),
        (MergeConfig, {"adapters": ["run"], "output_dir": "x.safetensors"},
         "MergeConfig(output_dir): 'x.safetensors': a directory is written, and x.safetensors is "
         "the name of a file. Name it x."),
        (TrainConfig, {"output": "runs/x.yaml"},
         "TrainConfig(output.dir): 'runs/x.yaml': a directory is written, and x.yaml is the name "
         "of a file. Name it runs/x."),
        (ExportConfig, {"model": "run", "server": "gguf-lora", "out": "x"},
         "ExportConfig(server): 'gguf-lora': it is a format, and --for names a server. Use "
         "--format gguf-lora."),
        (ExportConfig, {"model": "run", "format": "vllm", "out": "x"},
         "ExportConfig(format): 'vllm': it is a server, and --format names a format. Use --for "
         "vllm."),
    ],
)  # fmt: skip
def test_output_name_must_match_export_format(section, values, message):
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert error.value.problems == [message]
    assert MergeConfig(adapters=["run"], output_dir="merged-v1.5").output_dir == Path("merged-v1.5")


@pytest.mark.parametrize("adapters", ["run", Path("run"), [Path("run")], ("run",)])
def test_merge_config_accepts_a_path_and_a_single_adapter(adapters):
    assert MergeConfig(adapters=adapters, output_dir="merged").adapters == ["run"]


def test_python_function_is_a_reward(tmp_path, monkeypatch):
    file = tmp_path / "my_rewards.py"
    file.write_text("def short(completions, **_):\n    return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("my_rewards").short
    config = TrainConfig(task="rl", rl={"reward": [function, "length:1-9=0.2"]})
    assert config.rl.reward == (f"{file}:short", "length:1-9=0.2")


@pytest.mark.parametrize("reward", [lambda **_: [1.0], functools.partial(len), len])
def test_function_without_importable_name_is_no_reward(reward):
    with pytest.raises(ConfigError, match="not a function at the top level of an imported module"):
        TrainConfig(task="rl", rl={"reward": reward})


def test_home_directory_in_output_paths_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainConfig.model_validate({"output": {"dir": "~/run"}}).output.dir == tmp_path / "run"
    assert MergeConfig(adapters=["run"], output_dir=Path("~/m")).output_dir == tmp_path / "m"
    assert ExportConfig(model="m", out=Path("~/m.gguf")).out == tmp_path / "m.gguf"
