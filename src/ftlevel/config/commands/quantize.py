"""What `ftlevel quantize` is told: the model, the form, the place, and what it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.options.hub import HubSection
from ftlevel.config.section import NewDirectory
from ftlevel.config.sections import Positive, QuantConfig


class QuantizeConfig(HubSection):
    """Everything that decides a quantized checkpoint."""

    model: str = Field(
        min_length=1, description="Hub id, local directory, local .gguf file, or builtin:NAME."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    quant: Literal["4bit", "8bit", "int8-torchao", "float8-torchao"] = Field(
        description="4bit (NF4 or FP4 in blocks of 64) or 8bit (LLM.int8()); int8-torchao or "
        "float8-torchao: torchao's weights in 8 bits with a scale a row, an extra."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is the better one (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False, description="Quantize the 4-bit scales too: saves about 0.4 bit a weight."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of what is not quantized; auto keeps the model's own."
    )
    out: NewDirectory = Field(description="Directory to write; it must not exist.")
    measure: bool = Field(
        True, description="Load the result and compare it with the source on text."
    )
    eval_text: Path | None = Field(
        None,
        description="Text file to compare on; the default is documentation of Python's library.",
    )
    eval_tokens: Positive = Field(2048, description="How many tokens of it are read.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the comparison runs; weights are quantized on the CPU."
    )

    @model_validator(mode="after")
    def _four_bit_settings_need_four_bits(self) -> QuantizeConfig:
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
        """The quantized form in a few words."""
        own = self.section
        return f"torchao {self.quant.partition('-')[0]} weights" if own is None else own.form

    @property
    def section(self) -> QuantConfig | None:
        """The quantization as a section of a training run would have it; None for torchao's."""
        if self.quant != "4bit" and self.quant != "8bit":
            return None
        return QuantConfig(
            kind=self.quant, quant_type=self.quant_type, double_quant=self.double_quant
        )
