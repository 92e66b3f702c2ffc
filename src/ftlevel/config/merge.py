"""Configuration of `ftlevel merge` and `ftlevel quantize`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.output import HubSection
from ftlevel.config.section import NewDirectory
from ftlevel.config.sections import DeviceName, Dtype, MovedBase, Positive, QuantConfig

Strategy = Literal["cat", "svd", "linear", "ties", "dare-ties", "dare-linear", "magnitude-prune"]
_PRUNING = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
_QUANTIZED = ("4bit", "8bit", "quantized", "nf4", "fp4")


class MergeConfig(HubSection):
    """Configuration of a merge."""

    adapters: list[str] = Field(
        min_length=1, description="Run or adapter to merge; several are combined into one first."
    )
    output_dir: NewDirectory = Field(
        description="Output directory of the merged model; it must not exist."
    )
    onto: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="Base weights that a quantized run is merged into. dequantized: the weights"
        " used in training; original: the weights before quantization; auto: the "
        "closer one to the trained model, by measurement.",
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
        description="Method that combines several adapters. cat: exact weighted sum of the updates "
        "(ranks add up); svd: that sum truncated to the largest rank; linear: A and B averaged "
        "separately, which is not the sum of the updates; ties, dare-linear, dare-ties, "
        "magnitude-prune: linear after pruning small (ties, magnitude) or random (dare) entries; "
        "ties also drops entries of opposite sign.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Fraction of entries kept by ties, dare and magnitude-prune; default: 0.5.",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_old_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "base" not in raw or "base_model" in raw:
            return raw
        message = "MergeConfig(base) is now base_model; the old name will be removed."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return {"base_model" if name == "base" else name: raw[name] for name in raw}

    @field_validator("onto", mode="before")
    @classmethod
    def _check_onto(cls, value: object) -> object:
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

    @model_validator(mode="after")
    def _check_mixture(self) -> MergeConfig:
        count = len(self.adapters)
        problems = []
        if self.weights is not None and len(self.weights) != count:
            problems.append(
                f"--weights gives {len(self.weights)} numbers for {count} adapters. Give one each."
            )
        if self.weights is not None and any(weight == 0 for weight in self.weights):
            problems.append("--weights has a 0: leave that adapter out.")
        if count == 1 and self.strategy != "cat":
            problems.append(
                f"--strategy {self.strategy} needs several adapters and got one. Drop it."
            )
        given = {"--quant-type": self.quant_type, "--double-quant": self.double_quant}
        low = [flag for flag, value in given.items() if value is not None]
        if low and self.quant != "4bit":
            problems.append(
                f"{low[0]} belongs to --quant 4bit, and --quant is {self.quant}. Drop it."
            )
        if self.quant != "none" and self.onto == "original":
            problems.append(
                f"--onto original cannot be used with --quant {self.quant}, which approximates "
                f"the trained model. Drop --onto."
            )
        if self.density is not None and self.strategy not in _PRUNING:
            problems.append(
                f"--density belongs to --strategy {', '.join(_PRUNING)}, and --strategy is "
                f"{self.strategy}. Drop it."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class QuantizeConfig(HubSection):
    """Configuration of a quantized checkpoint."""

    model: str = Field(
        min_length=1, description="Model: Hub id, local directory, .gguf file, or builtin:NAME."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    quant: Literal["4bit", "8bit", "int8-torchao", "float8-torchao"] = Field(
        description="Quantization: 4bit, 8bit, int8-torchao or float8-torchao. 4bit is NF4 or "
        "FP4 in blocks of 64; 8bit is LLM.int8(); the torchao types have one scale "
        "per row and need an extra package."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is more accurate (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False, description="Whether to quantize the 4-bit scales too; saves about 0.4 bit a weight."
    )
    dtype: Dtype = Field(
        "auto", description="Data type of non-quantized tensors; auto: that of the model."
    )
    out: NewDirectory = Field(description="Output directory; it must not exist.")
    measure: bool = Field(
        True, description="Whether to compare the result with the source on text."
    )
    eval_text: Path | None = Field(
        None, description="Text file for the comparison; default: Python library documentation."
    )
    eval_tokens: Positive = Field(2048, description="Number of tokens to read from the text.")
    device: DeviceName = Field(
        "auto", description="Device for the comparison; quantization runs on the CPU."
    )

    @model_validator(mode="after")
    def _check_four_bit_settings(self) -> QuantizeConfig:
        given = {"--double-quant": self.double_quant, "--quant-type fp4": self.quant_type != "nf4"}
        wrong = [flag for flag, is_given in given.items() if is_given and self.quant != "4bit"]
        if wrong:
            raise ValueError(
                f"{wrong[0]} belongs to --quant 4bit, and --quant is {self.quant}. "
                f"Use --quant 4bit, or drop {wrong[0].split()[0]}."
            )
        return self

    @property
    def form(self) -> str:
        """Quantization in a few words."""
        own = self.section
        return f"torchao {self.quant.partition('-')[0]} weights" if own is None else own.form

    @property
    def section(self) -> QuantConfig | None:
        """Quantization as a section of a training run; None for torchao types."""
        if self.quant != "4bit" and self.quant != "8bit":
            return None
        return QuantConfig(
            kind=self.quant, quant_type=self.quant_type, double_quant=self.double_quant
        )
