"""The rules between sections, and that the configuration is closed, frozen and described."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, ValidationError

from ftlevel.config import SPECS, TrainConfig, build_config, read_settings
from ftlevel.errors import ConfigError

RULES = [
    (["method=full", "quant=4bit"],
     "--quant 4bit cannot be used with --method full: 4-bit weights receive no gradients. "
     "Use --method qlora, or drop --quant."),
    (["method=qlora", "quant=none"],
     "--method qlora needs a quantized base, and --quant is none. Use --quant 4bit or 8bit, or "
     "--method lora."),
    (["quant.double_quant=true"],
     "--double-quant belongs to --quant 4bit, and --quant is none. Use --quant 4bit, or drop "
     "--double-quant."),
    (["quant=8bit", "quant.quant_type=fp4"],
     "--quant-type fp4 belongs to --quant 4bit, and --quant is 8bit. Use --quant 4bit, or drop "
     "--quant-type."),
    (["quant=8bit", "method.use_dora=true"],
     "use_dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the "
     "magnitude. Use --quant 4bit, or drop use_dora."),
    (["model.dtype=float16", "model.device=cpu"],
     "--dtype float16 cannot be used on the CPU, which computes it in software and overflows in "
     "training. Use --dtype bfloat16 or float32."),
    (["output.resume=true", "output.overwrite=true", "output.dir=x"],
     "--resume keeps a run and --overwrite replaces it. Give one of them."),
    (["output.resume=true"], "--resume needs the run to go on with. Add --output-dir RUN."),
    (["task=summarization", "data.overlong=split"],
     "--overlong split cuts plain text into several rows and cannot be used with --task "
     "summarization. Use --overlong drop or truncate-prompt."),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), RULES)
def test_sections_that_contradict_each_other(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config([read_settings(settings)])
    assert message in caught.value.problems


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


@pytest.mark.parametrize("section", [*sections(TrainConfig), *SPECS.values()])
def test_every_field_is_described_and_every_section_closed(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"]
    for name, field in section.model_fields.items():
        assert field.description or name == "kind", f"{section.__name__}.{name}"
    assert section.__doc__


def test_a_config_cannot_be_written_to() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1  # type: ignore[misc]


def test_a_dumped_config_is_the_same_config() -> None:
    config = build_config([read_settings(["method=qlora", "train.seed=7", "data.max_length=9"])])
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_schema_names_every_method_and_forbids_other_keys() -> None:
    schema = TrainConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(SPECS)


def test_the_config_is_read_without_the_heavy_stack() -> None:
    code = (
        "import sys, ftlevel.config, ftlevel.cli.train; "
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
