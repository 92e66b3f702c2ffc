"""What `ftlevel merge` is told.

What `ftlevel quantize` is told: the model, the form, the place, and what it is measured on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ftlevel.config.output import HubSection
from ftlevel.config.section import NewDirectory
from ftlevel.config.sections import Positive, QuantConfig

Strategy = Literal["cat", "svd", "linear", "ties", "dare-ties", "dare-linear", "magnitude-prune"]
_PRUNING = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
_QUANTIZED = ("4bit", "8bit", "quantized", "nf4", "fp4")


class MergeConfig(HubSection):
    """Everything that decides a merge."""

    adapters: list[str] = Field(
        min_length=1, description="Run or adapter to merge; several are mixed into one first."
    )
    output_dir: NewDirectory = Field(
        description="Directory of the merged model; it must not exist yet."
    )
    onto: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="Weights that a quantized run is merged into: dequantized are those that it "
        "was trained on, original are those before quantization; auto measures both and takes the "
        "one nearer to the model as trained.",
    )
    base_model: str | None = Field(
        None,
        min_length=1,
        description="Where an adapter's base model is now, if it has moved; its weights must be "
        "the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the merged weights; auto keeps the base's."
    )
    quant: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="Write the merged model in the bits that it is served in. The codes are chosen "
        "so that its layers give what was trained; rounding alone would erase it.",
    )
    quant_type: Literal["nf4", "fp4"] | None = Field(
        None, description="4-bit data type; the default is the run's, or nf4."
    )
    double_quant: bool | None = Field(
        None, description="Quantize the 4-bit scales too; the default is as the run did."
    )
    calibration_rows: Annotated[int, Field(ge=0)] = Field(
        128,
        description="Rows of the run's training data on which the layers' outputs count where "
        "codes are chosen; 0 rounds each weight by itself.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the models are compared; merging itself is done on the CPU."
    )
    verify: bool = Field(
        True,
        description="Load what was written and compare it with the base and the adapter on rows "
        "of the run's data.",
    )
    rows: Positive = Field(32, description="How many rows are compared, at most.")
    weights: list[float] | None = Field(
        None, description="Weight of each adapter of a mixture: 0.7,0.3; the default is 1 each."
    )
    strategy: Strategy = Field(
        "cat",
        description="How several adapters become one. cat: the weighted sum of the updates, "
        "exactly; the ranks add up. svd: that sum, cut to the largest rank. linear: A and B are "
        "averaged apart, which is not the sum of the updates. ties, dare-linear, dare-ties, "
        "magnitude-prune: linear after small (ties, magnitude) or random (dare) entries are "
        "dropped; ties also drops what disagrees in sign.",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of entries that ties, dare and magnitude-prune keep; default 0.5."
    )

    @field_validator("onto", mode="before")
    @classmethod
    def _is_not_quantized(cls, value: object) -> object:
        if value in _QUANTIZED:
            raise ValueError(
                "weights of 4 or 8 bits cannot hold the update: rounding it to their grid erases "
                "most of what was trained. Use --quant 4bit, which chooses the codes by what was "
                "trained, or merge with --onto auto"
            )
        return value

    @field_validator("weights", mode="before")
    @classmethod
    def _commas_separate(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _mixture_agrees(self) -> MergeConfig:
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
                f"--strategy {self.strategy} mixes adapters, and there is one. Drop it."
            )
        given = {"--quant-type": self.quant_type, "--double-quant": self.double_quant}
        low = [flag for flag, value in given.items() if value is not None]
        if low and self.quant != "4bit":
            problems.append(
                f"{low[0]} belongs to --quant 4bit, and --quant is {self.quant}. Drop it."
            )
        if self.quant != "none" and self.onto == "original":
            problems.append(
                f"--onto original is another model than the one trained, and --quant {self.quant} "
                "comes as near to that as it can. Drop --onto."
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
