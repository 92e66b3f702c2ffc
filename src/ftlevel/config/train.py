"""The whole configuration of a training run, and the rules between its sections."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from ftlevel.config.methods import LoraSpec, MethodConfig, QloraSpec
from ftlevel.config.sections import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    QuantConfig,
    Section,
    TrainerConfig,
)

TaskName = Literal["text-generation", "summarization", "text-classification"]
TASKS: tuple[str, ...] = get_args(TaskName)


class TrainConfig(Section):
    """Everything that decides a run. The same configuration gives the same adapter."""

    task: TaskName = Field("text-generation", description="What the model learns to do.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The pretrained model.")
    quant: QuantConfig = Field(default_factory=QuantConfig, description="Quantization of the base.")
    method: MethodConfig = Field(default_factory=LoraSpec, description="What is trained.")
    data: DataConfig = Field(default_factory=DataConfig, description="The examples.")
    train: TrainerConfig = Field(default_factory=TrainerConfig, description="The optimisation.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="What is written.")

    @model_validator(mode="before")
    @classmethod
    def _qlora_means_four_bits(cls, raw: Any) -> Any:
        """Give `qlora` its 4-bit base where nothing else is asked for."""
        if not isinstance(raw, dict) or not isinstance(raw.get("method"), dict):
            return raw
        quant = raw.get("quant") or {}
        if raw["method"].get("kind") == "qlora" and isinstance(quant, dict) and "kind" not in quant:
            return {**raw, "quant": {**quant, "kind": "4bit"}}
        return raw

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainConfig:
        problems = list(_quantization_problems(self)) + list(_other_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _quantization_problems(config: TrainConfig) -> list[str]:
    quant, method = config.quant, config.method
    problems = []
    if quant.kind != "none" and method.kind == "full":
        problems.append(
            f"--quant {quant.kind} cannot be used with --method full: {quant.kind[0]}-bit weights "
            "receive no gradients. Use --method qlora, or drop --quant."
        )
    if quant.kind == "none" and isinstance(method, QloraSpec):
        problems.append(
            "--method qlora needs a quantized base, and --quant is none. "
            "Use --quant 4bit or 8bit, or --method lora."
        )
    if quant.kind != "4bit":
        for flag, given in (
            ("--double-quant", quant.double_quant),
            ("--quant-type fp4", quant.quant_type != "nf4"),
        ):
            if given:
                problems.append(
                    f"{flag} belongs to --quant 4bit, and --quant is {quant.kind}. "
                    f"Use --quant 4bit, or drop {flag.split()[0]}."
                )
    if quant.kind == "8bit" and isinstance(method, LoraSpec) and method.use_dora:
        problems.append(
            "use_dora cannot be used with --quant 8bit: PEFT cannot read 8-bit weights for the "
            "magnitude. Use --quant 4bit, or drop use_dora."
        )
    return problems


def _other_problems(config: TrainConfig) -> list[str]:
    problems = []
    if config.model.dtype == "float16" and config.model.device == "cpu":
        problems.append(
            "--dtype float16 cannot be used on the CPU, which computes it in software and "
            "overflows in training. Use --dtype bfloat16 or float32."
        )
    if config.output.overwrite and config.output.resume:
        problems.append("--resume keeps a run and --overwrite replaces it. Give one of them.")
    if config.output.resume and config.output.dir is None:
        problems.append("--resume needs the run to go on with. Add --output-dir RUN.")
    if config.data.overlong == "split" and config.task != "text-generation":
        problems.append(
            f"--overlong split cuts plain text into several rows and cannot be used with --task "
            f"{config.task}. Use --overlong drop or truncate-prompt."
        )
    return problems
