"""Model, quantization, data and speed sections; None and "auto" are resolved by ftlevel.

Field names are those of transformers, PEFT and bitsandbytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator, field_validator

from ftlevel.config.constraints import Constraints, Excludes, Needs, NoEffect
from ftlevel.config.gate import GateConfig
from ftlevel.config.section import FewNames
from ftlevel.config.section import Positive as Positive
from ftlevel.config.section import Section as Section
from ftlevel.config.section import Share as Share

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
ComputePrecision = Annotated[Dtype, Field(description="Compute precision; auto: as in training.")]
RunDevice = Annotated[DeviceName, Field(description="Device to run on.")]
MovedBase = Annotated[
    str | None,
    Field(
        min_length=1,
        description="Current location of the base model, if it has moved. Its weights must be "
        "the same.",
    ),
]

IN_MEMORY = "in memory"
"""Dataset name of rows that are passed as Python objects."""


class InMemoryDataset(str):
    """String that names a dataset in memory; `rows` is a DataFrame, `Dataset` or an iterable."""

    rows: Any
    label: str

    def __new__(cls, rows: Any) -> InMemoryDataset:
        """Create a string with the value `IN_MEMORY`, and set its attribute `rows`."""
        dataset = super().__new__(cls, IN_MEMORY)
        dataset.rows, dataset.label = rows, "dataset"
        return dataset

    def __getnewargs__(self) -> Any:
        return (self.rows,)


def wrap_rows(value: Any) -> Any:
    """Returns rows as `InMemoryDataset`, a path as text, and any other value unchanged."""
    if isinstance(value, os.PathLike):  # arguments are not validated yet
        return os.fspath(value)
    is_frame = hasattr(value, "columns") and hasattr(value, "to_dict")
    if isinstance(value, str | bytes) or not (hasattr(value, "__iter__") or is_frame):
        return value
    return InMemoryDataset(value)


def _accept(value: Any, validate: Any) -> Any:
    dataset = wrap_rows(value)
    return dataset if isinstance(dataset, InMemoryDataset) else validate(dataset)


DatasetName = Annotated[str, WrapValidator(_accept)]
"""Name of a dataset, or the rows."""


DEFAULT_MODEL = "builtin:tiny-llama"
DEFAULT_DATASET = "builtin:docstrings"


class ModelConfig(Section):
    """Settings of the pretrained model, such as name and dtype."""

    name_or_path: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="Model: Hub id, local directory, .gguf file, or builtin:NAME.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    dtype: Dtype = Field("auto", description="Compute precision; auto: bfloat16 where supported.")
    device: DeviceName = Field("auto", description="Device; auto: CUDA, then MPS, then CPU.")
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention implementation; auto: chosen by transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Whether to run Python code that ships with the model."
    )
    adapter: str | None = Field(
        None,
        min_length=1,
        description="Trained adapter to continue from: run, adapter directory or PEFT adapter. "
        "Its base model and method are used.",
    )


class QuantConfig(Section):
    """Quantization of the frozen base weights during training (bitsandbytes)."""

    kind: Literal["none", "4bit", "8bit"] = Field(
        "none", description="Quantization of the base model's weights: none, 4bit or 8bit."
    )
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="4-bit data type; nf4 is more accurate (QLoRA, section 3)."
    )
    double_quant: bool = Field(
        False,
        description="Whether to quantize the 4-bit scales too; saves about 0.4 bit per weight.",
    )
    experts: bool | None = Field(
        None,
        description="Whether to quantize the experts of an MoE model too, in 4 bits. Default: "
        "yes, unless they are adapted.",
    )

    @property
    def facts(self) -> dict[str, Any]:
        """Settings as saved in ftlevel.json: name → value; `experts` only if they are quantized."""
        if self.kind != "4bit":
            return {"kind": self.kind}
        return self.model_dump(exclude=None if self.experts else {"experts"})

    @property
    def form(self) -> str:
        """Short description of the quantization, such as `4-bit nf4`."""
        if self.kind != "4bit":
            return "8-bit LLM.int8()" if self.kind == "8bit" else "not quantized"
        double = ", double quantization" if self.double_quant else ""
        return f"4-bit {self.quant_type}{double}" + (", experts too" if self.experts else "")


INPUT_FORMAT = (
    "Format of local files and stdin: csv, jsonl, conll, …; default: detected. Detection uses "
    "the file name, or the first bytes."
)

IgnoredColumns = Annotated[
    FewNames,
    Field(
        description="Comma-separated columns to ignore. Required for columns of images, audio or "
        "video, which are refused otherwise."
    ),
]
ColumnMap = Annotated[
    dict[str, str],
    Field(
        description="Column mapping, FTLEVEL_NAME=YOUR_COLUMN, e.g. summary=abstract.",
        examples=[{"summary": "abstract"}],
    ),
]


class DataConfig(Section):
    """Datasets, and how their rows are read and encoded."""

    dataset: DatasetName = Field(
        DEFAULT_DATASET,
        min_length=1,
        description="Training data: file, directory, glob, Hub id, or builtin:docstrings. Use -"
        " for stdin; repeatable.",
    )
    also: tuple[str, ...] = Field((), description="Additional datasets, from a repeated --dataset.")
    mix: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="Proportions of training rows per dataset, in order, e.g. 3,7. Default: all"
        " rows of each dataset. No row is repeated.",
    )
    input_format: str | None = Field(None, min_length=1, description=INPUT_FORMAT)
    subset: str | None = Field(
        None, description="Configuration (subset) of a Hub dataset, or sheet of a workbook."
    )
    split: str | None = Field(None, description="Split to train on; default: train.")
    format: str | None = Field(
        None,
        min_length=1,
        description="Format of the rows; default: the first format that matches. messages, "
        "sharegpt, prompt-completion, alpaca, text, squad, …",
    )
    columns: ColumnMap = Field(default_factory=dict)
    ignore_columns: IgnoredColumns = ()
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat template for models without one: a name or a Jinja file. Names: "
        "chatml, gemma, llama-3, mistral, qwen.",
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="System prompt for conversations without one. It is also used after training.",
    )
    train_on_inputs: bool = Field(
        False,
        description="Whether to include prompts in the training loss. Evaluation scores answers"
        " only.",
    )
    validation_file: DatasetName | None = Field(
        None,
        min_length=1,
        description="Validation data: file, directory, glob pattern or Hub id. It replaces the "
        "validation rows of the dataset.",
    )
    qrels: Path | None = Field(
        None,
        description="Relevance judgments (.tsv) of a retrieval set in BEIR's layout, in place of "
        "validation rows. Queries and corpus are read from its directory.",
    )
    corpus: Path | None = Field(
        None,
        description="Corpus that validation queries are searched in. Default: texts of the "
        "validation rows, or corpus.jsonl beside --qrels.",
    )
    validation_split: Share | None = Field(
        None, description="Fraction of training rows held out if there are no validation rows."
    )
    max_samples: Positive | None = Field(
        None, description="Maximum number of training rows; the first N are used."
    )
    max_eval_samples: Positive | None = Field(
        None, description="Maximum number of validation rows; the first N are used."
    )
    max_length: Positive | Literal["auto"] = Field(
        "auto",
        description="Maximum row length in tokens; auto: chosen from data and memory. auto is the "
        "length of the longest row, up to what positions and memory allow. At most 1 % of the "
        "rows may be longer; they are dropped.",
    )
    max_target_length: Positive = Field(
        256, description="Maximum target length in tokens, for encoder-decoder models."
    )
    overlong: Literal["error", "drop", "truncate", "truncate-prompt", "split"] = Field(
        "error",
        description="Action for rows longer than max_length. split cuts plain text into several "
        "rows; truncate cuts the end of texts to embed or to rerank; truncate-prompt cuts the "
        "beginning of prompts, or the end of texts to classify or to rerank. Answers are never "
        "truncated silently.",
    )
    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = Field(
        "auto", description="Type of the classification labels; auto: inferred from the data."
    )
    labels: tuple[str, ...] = Field(
        (),
        description="Class or tag names in the order of the head's outputs; default: from the "
        "data.",
    )
    source_language: str | None = Field(
        None,
        min_length=2,
        description="Source language for translation; default: the language that the column is "
        "named after.",
    )
    target_language: str | None = Field(
        None,
        min_length=2,
        description="Target language for translation; default: the language that the column is "
        "named after.",
    )
    doc_stride: int = Field(
        128, ge=0, description="Overlap in tokens between windows of a long context (SQuAD)."
    )
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="Fraction of tokens that masked-lm masks."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="Action for unreadable rows: error, or skip (dropped and counted)."
    )
    num_proc: Positive = Field(1, description="Number of processes that encode a large dataset.")
    cache: bool = Field(True, description="Whether to cache the encoded rows of a large dataset.")
    gate: GateConfig = Field(default_factory=GateConfig, description="Actions for data problems.")

    @field_validator("mix", mode="before")
    @classmethod
    def _split_mix(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("columns")
    @classmethod
    def _validate_columns(cls, value: dict[str, str]) -> dict[str, str]:
        if any(not key or not column for key, column in value.items()):
            raise ValueError("a column's name is empty")
        return value


class SpeedConfig(Section):
    """Optimizations of the training step (the fast step); they do not change the result."""

    fast: bool = Field(
        True,
        description="Whether to use ftlevel's optimized training step (the fast step); off uses "
        "only transformers' and PEFT's code.",
    )
    pack: bool = Field(
        True,
        description="Whether to pack the rows of a micro-batch, without attention across rows.",
    )
    chunked_cross_entropy: bool = Field(
        True, description="Whether to compute logits and loss in chunks, at supervised tokens only."
    )
    prune_last_layer: bool = Field(
        True,
        description="Whether to compute the last block only for tokens the head needs. Other "
        "tokens get only keys and values.",
    )
    fused_lora: bool = Field(
        True,
        description="Whether to compute base layer and LoRA in one autograd function. It "
        "computes in the precision of the base.",
    )
    fused_norm_glu: bool = Field(
        True,
        description="Whether to fuse norms and gated linear units of frozen weights. Each becomes "
        "one autograd function, which saves less for the backward pass.",
    )
    share_prefixes: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether to compute a prefix only once if several rows of a step share it. "
        "auto: if that saves 5 % of the tokens and there is no dropout.",
    )
    liger_kernel: bool = Field(
        True,
        description="Whether to use liger-kernel on a CUDA GPU, where it is installed and supports "
        "the model. It replaces norms, rotary embedding and activation.",
    )
    tokens_per_micro_batch: Positive | Literal["auto"] = Field(
        "auto",
        description="Maximum number of tokens per micro-batch, which bounds the memory. auto: on "
        "a GPU as many as are estimated to fit, at most 16,384 or the longest row; on a CPU "
        "per_device_train_batch_size rows of max_length, at most 2,048 tokens (an eighth more with "
        "shared prefixes, with --task rl a group of completions per worker if memory allows). "
        "Rows per optimizer step do not change.",
    )
    parallel_workers: Positive | Literal["auto"] = Field(
        "auto",
        description="Number of workers on a CPU, each computing one micro-batch. They share the"
        " threads; auto: one per thread, at most 4, if there is no dropout.",
    )
    verify: bool | None = Field(
        None,
        description="Compare loss and gradients of the first three steps with transformers' and "
        "PEFT's own code in float32, with and without dropout, and stop if they differ. Default: "
        "compare only a few rows, and train without the fast step if they differ; off: no "
        "comparison.",
    )


DISTILLATION_TASKS = ("text-generation", "summarization", "translation")
Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class DistillationConfig(Section):
    """Token-level distillation from a teacher model."""

    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Teacher model for distillation: a run, adapter or model with the same "
        "tokenizer; for embedding and reranking, any embedding model or reranker.",
    )
    divergence: Divergence = Field(
        "forward-kl",
        description="Divergence to minimize. forward-kl: KL(teacher, model); reverse-kl: "
        "KL(model, teacher); jsd: generalized Jensen–Shannon divergence.",
    )
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Weight of the teacher in the mixture distribution of jsd."
    )
    kd_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="Weight of the divergence in the loss; cross-entropy has weight 1 - kd_ratio.",
    )
    kd_temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0,
        description="Temperature for the logits of teacher and model. The divergence is "
        "multiplied by its square.",
    )
    kd_top_k: Positive | Literal["all"] = Field(
        64,
        description="Number of top teacher tokens stored per position; the rest of the "
        "probability mass is stored as one value. all stores the whole vocabulary.",
    )


_KD_FIELDS = [name for name in DistillationConfig.model_fields if name != "teacher"]
_WITH_TEACHER = "distillation.teacher!=None"


def list_unused_fields(tasks: str, reason: str) -> list[NoEffect]:
    """Returns that only `--teacher` has an effect with `tasks`, such as `A|B`, for `reason`."""
    return [
        NoEffect(f"distillation.{name}", f"task={tasks}", reason, when=_WITH_TEACHER)
        for name in _KD_FIELDS
    ]


def list_distillation_rules(learners: Sequence[str]) -> Constraints:
    """Returns the constraints of distillation.

    `learners` are the tasks of extensions that use the teacher in their own way.
    """
    tasks = (*DISTILLATION_TASKS, *learners)
    return (
        *[Needs(f"distillation.{name}", "distillation.teacher MODEL") for name in _KD_FIELDS],
        Excludes("distillation.teacher", f"task!={'|'.join(tasks)}",
             f"it is for {', '.join(tasks)}", "Drop it, or change the task."),
        NoEffect("distillation.jsd_beta", "distillation.divergence!=jsd", "it is for jsd",
             when=_WITH_TEACHER),
        Excludes("train.label_smoothing_factor", "distillation.teacher",
             "the teacher defines the target distribution"),
    )  # fmt: skip
