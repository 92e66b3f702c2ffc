"""The sections of a training configuration: frozen, closed to unknown keys, without behaviour.

A field's help is written here once and feeds `--help`, the JSON schema and the docs. Names are
those of transformers, PEFT and bitsandbytes. `None` and "auto" mean that ftlevel chooses and shows
its choice with the reason.

How a step is computed: what changes the speed and never the result.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ftlevel.config.gate import GateConfig
from ftlevel.config.in_memory import DatasetName
from ftlevel.config.preference import FewNames
from ftlevel.config.section import Positive as Positive
from ftlevel.config.section import Section as Section
from ftlevel.config.section import Share as Share

DEFAULT_MODEL = "builtin:tiny-llama"
DEFAULT_DATASET = "builtin:docstrings"


class ModelConfig(Section):
    """Which pretrained model, and how it is held in memory."""

    name_or_path: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="Hub id, local directory, local .gguf file, or builtin:NAME.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute precision; auto takes bfloat16 where the device has it."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where to run; auto takes CUDA, then MPS, then the CPU."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto leaves the choice to transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you say so."
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="Go on from a trained adapter, whose base and method are taken: a run, its "
        "adapter directory, or one of plain PEFT's.",
    )


class QuantConfig(Section):
    """How the frozen base weights are quantized while training (bitsandbytes)."""

    kind: Literal["none", "4bit", "8bit"] = Field(
        "none", description="Quantize the base weights: none, 4bit or 8bit."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is the better one (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False, description="Quantize the 4-bit scales too: saves about 0.4 bit a weight."
    )
    experts: bool | None = Field(
        None,
        description="Quantize the experts of a mixture too, in 4 bits; the default does where "
        "there are some and no adapter goes on them.",
    )

    @property
    def facts(self) -> dict[str, Any]:
        """What a card says of it; that experts are quantized only where they are."""
        if self.kind != "4bit":
            return {"kind": self.kind}
        return self.model_dump(exclude=None if self.experts else {"experts"})

    @property
    def form(self) -> str:
        """The quantized form in a few words."""
        if self.kind != "4bit":
            return "8-bit LLM.int8()" if self.kind == "8bit" else "not quantized"
        double = ", double quantization" if self.double_quant else ""
        return f"4-bit {self.quant_type}{double}" + (", experts too" if self.experts else "")


INPUT_FORMAT = (
    "What local files and stdin hold, as the ending of a name without its dot: csv, jsonl, "
    "conll, …; the default is by their names, or by their beginning."
)

IGNORE_COLUMNS = (
    "Columns to leave out, with commas between; columns of images, audio or video are refused "
    "unless they are named here."
)


class DataConfig(Section):
    """Where the examples come from and how a row becomes tokens."""

    dataset: DatasetName = Field(
        DEFAULT_DATASET,
        min_length=1,
        description="Local file, directory or pattern of files, Hub id, - for stdin, or "
        "builtin:docstrings; repeatable.",
    )
    also: tuple[str, ...] = Field(
        (), description="Further data sets, trained on together with `dataset`; --dataset repeated."
    )
    mix: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="Share of the training rows that each data set gives, in their order, as in "
        "3,7; without it each gives all of its rows. No row comes twice.",
    )
    streaming: bool = Field(
        False,
        description="Read, check and encode the rows as they come, for a set that does not fit; "
        "needs --max-steps.",
    )
    shuffle_buffer: Positive = Field(
        1_000, description="Rows among which a streamed one is drawn; 1 keeps the order."
    )
    validation_rows: Positive | None = Field(
        None, description="First rows of a streamed set that are held out for evaluation."
    )
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(
        None, description="Configuration (subset) of a Hub data set, or sheet of a workbook."
    )
    split: str | None = Field(None, description="Split to train on; the default is train.")
    format: str | None = Field(
        None,
        min_length=1,
        description="What the columns are, where they fit several formats: messages, sharegpt, "
        "prompt-completion, alpaca, text, squad, …; the default is the first that fits.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="What ftlevel calls a column: what the data calls it, as in summary: abstract.",
    )
    ignore_columns: FewNames = Field((), description=IGNORE_COLUMNS)
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat template where the model has none: chatml, gemma, llama-3, mistral, "
        "qwen, or a Jinja file.",
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="System turn of conversations that have none, in training and afterwards.",
    )
    train_on_inputs: bool = Field(
        False,
        description="Learn prompts as well as answers, in training alone: what is evaluated are "
        "the answers.",
    )
    validation_file: DatasetName | None = Field(
        None,
        min_length=1,
        description="File, directory, pattern of files or Hub id whose rows are the validation "
        "rows, in place of those that come with the data set.",
    )
    validation_split: Share | None = Field(
        None,
        description="Share of the training rows held out for evaluation when the data has none.",
    )
    max_samples: Positive | None = Field(None, description="Use only the first N training rows.")
    max_eval_samples: Positive | None = Field(
        None, description="Use only the first N validation rows."
    )
    max_length: Positive | Literal["auto"] = Field(
        "auto",
        description="Longest row in tokens; auto is the longest row, or what the model's positions "
        "and the machine's memory allow, where that loses at most 1 % of the rows.",
    )
    max_target_length: Positive = Field(
        256, description="Longest target in tokens, for encoder-decoder models."
    )
    overlong: Literal["error", "drop", "truncate-prompt", "split"] = Field(
        "error",
        description="What happens to a row beyond max_length; an answer is never cut silently.",
    )
    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = Field(
        "auto",
        description="What a text's label is: one class, several, or a number; auto looks at them.",
    )
    labels: tuple[str, ...] = Field(
        (),
        description="Names of the classes or tags, in the order of the head; the default is those "
        "of the data.",
    )
    source_language: str | None = Field(
        None,
        min_length=2,
        description="Language of the source in translation; the default is the column's code.",
    )
    target_language: str | None = Field(
        None,
        min_length=2,
        description="Language of the target in translation; the default is the column's code.",
    )
    doc_stride: int = Field(
        128, ge=0, description="Tokens by which windows of a long context overlap (SQuAD)."
    )
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Share of a text's tokens that masked-lm hides."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Stop at a row that cannot be read, or drop it and count it."
    )
    num_proc: Positive = Field(1, description="Processes that encode the rows of a large set.")
    cache: bool = Field(
        True, description="Keep the encoded rows of a large set, and use them when nothing changed."
    )
    gate: GateConfig = Field(
        default_factory=GateConfig, description="What happens to rows that would spoil the run."
    )

    @field_validator("mix", mode="before")
    @classmethod
    def _mix_is_a_list(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("columns")
    @classmethod
    def _names_are_not_empty(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not key or not column for key, column in value.items()):
            raise ValueError("a column's name is empty")
        return value


class SpeedConfig(Section):
    """Parts of the fast step; a part is on where it is known to give the plain step's numbers."""

    fast: bool = Field(
        True,
        description="Use the faster forms of the step; off leaves every part to the libraries.",
    )
    pack: bool = Field(
        True,
        description="Lay the rows of a micro-batch end to end, each attending to itself alone.",
    )
    chunked_cross_entropy: bool = Field(
        True,
        description="Compute a language head and its loss at supervised tokens only, in chunks.",
    )
    prune_last_layer: bool = Field(
        True,
        description="Compute the last block at the tokens that a head or a classifier needs, and "
        "of the others only what attention needs.",
    )
    fused_lora: bool = Field(
        True,
        description="Compute LoRA's base and update in one autograd function, in the base's "
        "precision.",
    )
    fused_norm_glu: bool = Field(
        True,
        description="Compute norms and gated linear units of frozen weights in one autograd "
        "function each, which keeps less for the backward pass.",
    )
    triton_kernels: bool = Field(
        True,
        description="On an NVIDIA GPU, compute fused norms and GLUs, rotary embeddings and the "
        "loss by Triton kernels, where these give the same numbers and are faster.",
    )
    attention_kernel: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+@[\w.-]+$")] | None = Field(
        None,
        description="On an NVIDIA GPU, attend to packed rows by this kernel of the Hugging Face "
        "hub, OWNER/NAME@VERSION (kernels-community/flash-attn3@1), which the package kernels "
        "fetches; none is torch's flash attention.",
    )
    share_prefixes: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compute a prefix that rows of a step have in common once; auto where it saves "
        "5 % of the tokens and nothing is dropped at random.",
    )
    liger_kernel: bool = Field(
        False,
        description="On a CUDA GPU, use liger-kernel's norms, rotary embedding and activation "
        "where the package is installed and has them for the model. Off until it is measured.",
    )
    tokens_per_micro_batch: Positive | Literal["auto", "memory"] = Field(
        "auto",
        description="Most tokens in the micro-batches that are computed at once, which bounds the "
        "memory; auto is what per_device_train_batch_size rows of max_length would have, on a CPU "
        "2,048 at most, an eighth more where prefixes are shared; memory is as many as the plan's "
        "forecast fits into the memory that is free (--auto-micro-batch). The rows of a step stay.",
    )
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GiB that the run may use at its peak, for tokens_per_micro_batch=memory; the "
        "default is what is free.",
    )
    parallel_workers: Positive | Literal["auto"] = Field(
        "auto",
        description="On a CPU, workers that compute a micro-batch each, with their share of the "
        "threads; auto is one a thread, 4 at most, where nothing is dropped at random.",
    )
    verify: bool | None = Field(
        None,
        description="Compute whole first steps the plain way too, in float32 and in the run's own "
        "precision, with dropout and without, and compare loss and gradients. By default a few "
        "rows are compared in float32 before every run; off compares nothing.",
    )
