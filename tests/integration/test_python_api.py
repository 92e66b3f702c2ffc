"""The Python API: the same runs as on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ftlevel
from forked import Forked
from ftlevel import FineTunePipeLine, TrainConfig, train
from ftlevel.errors import ConfigError
from ftlevel.methods import TUNERS

SHORT = {"max_steps": 1, "per_device_train_batch_size": 2}


def test_pipeline_returns_model_and_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"data": {"max_samples": 4, "max_eval_samples": 2}}))
    pipeline = FineTunePipeLine(
        args_dir=settings,
        task_type="text_generation",
        checkpoint="builtin:tiny-llama",
        dataset_name="builtin:docstrings",
        use_accelerate=True,
        peft_method="lora",
        peft_config={"r": 4},
        training_args=SHORT,
        output_dir=tmp_path / "run",
    )
    model, tokenizer = pipeline.run()
    assert model.peft_config["default"].r == 4
    assert tokenizer.chat_template
    assert pipeline.result.summary["steps"] == 1
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")


def test_train_with_config(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "data": {"max_samples": 4, "max_eval_samples": 2},
            "train": SHORT,
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    result = train(config)
    assert result.path == tmp_path / "run"
    assert result.summary["proof"]["reload_difference"] == 0


def test_unknown_key_names_pipeline_argument() -> None:
    with pytest.raises(ConfigError) as error:
        FineTunePipeLine(peft_method="lora", peft_config={"rank": 4})
    assert str(error.value) == (
        "FineTunePipeLine(peft_config): unknown key 'method.rank'. Did you mean 'method.r'?"
    )


def test_package_import_does_not_load_torch() -> None:
    code = "import sys, ftlevel; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["False", "False"]


def test_adapters_attribute_registers_tuners_in_peft() -> None:
    code = (
        "from peft import PeftConfig, mapping; known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING; "
        "print('BOTTLENECK' in known); import ftlevel; ftlevel.adapters; "
        "print(*[t for t in ('BOTTLENECK', 'PREFIX_KV') if t in known])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    output, error = Forked(call=(exec, (code, {})), imported="libraries", **pipes).communicate()
    assert output.split() == ["False", "BOTTLENECK", "PREFIX_KV"], error
    readme = Path(__file__).parents[2] / "README.md"
    assert f"import {TUNERS}" in readme.read_text(encoding="utf-8")


def test_invalid_arguments_raise_config_error(tmp_path: Path) -> None:
    from ftlevel import FineTunePipeLine, train
    from ftlevel.errors import ConfigError

    with pytest.raises(ConfigError, match=r"peft_config\): \[1\] is not a mapping"):
        FineTunePipeLine(peft_config=[1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train\(\) was given dict"):
        train({"task": "text-generation"})  # type: ignore[arg-type]
    for name in ("evaluate", "merge", "predict", "quantize"):
        with pytest.raises(ConfigError, match=rf"is of type str. Pass {name.title()}Config\(…\)"):
            getattr(ftlevel, name)("run")
    config = FineTunePipeLine(checkpoint=tmp_path, dataset_name=tmp_path / "x").config  # type: ignore[arg-type]
    assert config.model.name_or_path == str(tmp_path)
    with pytest.warns(FutureWarning, match="'sft' is an alias") as warned:
        FineTunePipeLine(task_type="sft")
    assert [warning.filename for warning in warned] == [__file__]
