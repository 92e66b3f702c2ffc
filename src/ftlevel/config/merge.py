"""Configuration of `ftlevel merge` and `quantize`. Must not import torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ftlevel.config.constraints import Constraints, Excludes, Needs
from ftlevel.config.output import HubSection
from ftlevel.config.section import NewDirectory
from ftlevel.config.sections import DeviceName, Dtype, MovedBase, Positive, QuantConfig
from ftlevel.errors import needs

Strategy = Literal["cat", "svd", "linear", "ties", "dare-ties", "dare-linear", "magnitude-prune"]
_PRUNING = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
_QUANTIZED = ("4bit", "8bit", "quantized", "nf4", "fp4")


class MergeConfig(HubSection):
    """Configuration of `ftlevel merge`."""

    constraints: ClassVar[Constraints] = (
        Needs("quant_type", "quant=4bit"),
        Needs("double_quant", "quant=4bit"),
        Excludes("onto=original", "quant", "it approximates the trained model", "Drop --onto."),
        Needs("density", f"strategy={'|'.join(_PRUNING)}"),
    )
    adapters: list[str] = Field(
        min_length=1, description="Run or adapter to merge; several are combined into one first."
    )
    output_dir: NewDirectory = Field(
        description="Output directory of the merged model; it must not exist."
    )
    onto: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="Base weights that a quantized run is merged into. dequantized: the weights "
        "used in training; original: the weights before quantization; auto: the one measured to "
        "be closer to the trained model.",
    )
    base_model: MovedBase = None
    dtype: Dtype = Field(
        "auto", description="Data type of the merged weights; auto: that of the base model."
    )
    quant: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="Quantization of the merged model: none, 4bit or 8bit. Codes are calibrated to "
        "preserve the trained layer outputs; rounding to nearest would erase the update.",
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="4-bit data type; default: that of the run, else nf4."
    )
    double_quant: bool | None = Field(
        None, description="Whether to quantize the 4-bit scales too; default: as in the run."
    )
    calibration_rows: Annotated[int, Field(ge=0)] = Field(
        128, description="Number of training rows for calibration; 0 rounds to nearest."
    )
    device: DeviceName = Field(
        "auto", description="Device for the comparison; merging itself runs on the CPU."
    )
    verify: bool = Field(
        True,
        description="Whether to compare the merged model with base model and adapter. Rows of "
        "the run's data are used.",
    )
    rows: Positive = Field(32, description="Maximum number of rows to compare.")
    weights: list[float] | None = Field(
        None, description="Comma-separated weights of the adapters, e.g. 0.7,0.3; default: 1 each."
    )
    strategy: Strategy = Field(
        "cat",
        description="Method that combines several adapters. cat: exact weighted sum of the "
        "updates (ranks add up); svd: that sum truncated to the adapters' largest rank; linear: A "
        "and B averaged separately, which is not the sum of the updates; ties, dare-linear, "
        "dare-ties, magnitude-prune: linear after pruning small (ties, magnitude) or random "
        "(dare) entries; ties also drops entries of opposite sign.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Fraction of entries kept by ties, dare and magnitude-prune; default: 0.5.",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _convert_adapters(cls, value: Any) -> Any:
        adapters = value if isinstance(value, list | tuple) else [value]
        return [os.fspath(one) if isinstance(one, os.PathLike) else one for one in adapters]

    @field_validator("onto", mode="before")
    @classmethod
    def _validate_onto(cls, value: object) -> object:
        if value in _QUANTIZED:
            raise ValueError(
                "weights of 4 or 8 bits cannot hold the update: rounding it to their grid erases "
                "most of what was trained. Use --quant 4bit, which chooses the codes by what was "
                "trained, or merge with --onto auto"
            )
        return value

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per conflict."""
        yield from super().list_conflicts()
        num_adapters, weights = len(self.adapters), self.weights
        if weights is not None and len(weights) != num_adapters:
            yield (
                f"--weights gives {len(weights)} numbers for {num_adapters} adapters. "
                "Give one each."
            )
        if 0 in (weights or ()):
            yield "--weights has a 0: leave that adapter out."
        if num_adapters == 1 and self.strategy != "cat":
            yield needs(f"--strategy {self.strategy}", "several adapters", fix="Drop it.")
        if self.quant == "none" and "calibration_rows" in self.model_fields_set:
            yield needs("--calibration-rows", "--quant 4bit or 8bit")


class QuantizeConfig(HubSection):
    """Configuration of `ftlevel quantize`."""

    constraints: ClassVar[Constraints] = (
        Needs("double_quant", "quant=4bit"),
        Needs("quant_type=fp4", "quant=4bit"),
    )
    model: str = Field(
        min_length=1, description="Model: Hub id, local directory, .gguf file, or builtin:NAME."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    quant: Literal["4bit", "8bit"] = Field(
        description="Quantization: 4bit or 8bit. 4bit is NF4 or FP4 in blocks of 64; 8bit is "
        "LLM.int8()."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is more accurate (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False,
        description="Whether to quantize the 4-bit scales too; saves about 0.4 bit per weight.",
    )
    dtype: Dtype = Field(
        "auto", description="Data type of non-quantized tensors; auto: that of the model."
    )
    out: NewDirectory = Field(description="Output directory; it must not exist.")
    measure: bool = Field(True, description="Whether to compare the result to the source on text.")
    eval_text: Path | None = Field(
        None, description="Text file for the comparison; default: Python library documentation."
    )
    eval_tokens: Positive = Field(2048, description="Number of tokens of --eval-text to use.")
    device: DeviceName = Field(
        "auto", description="Device for the comparison; quantization runs on the CPU."
    )

    @property
    def form(self) -> str:
        """Short description of the quantization, such as `4-bit nf4`."""
        return self.section.form

    @property
    def section(self) -> QuantConfig:
        """Equivalent `quant` section of a training run."""
        return QuantConfig(
            kind=self.quant, quant_type=self.quant_type, double_quant=self.double_quant
        )
