"""The sections of a training configuration: frozen, closed to unknown keys, without behaviour.

A field's help is written here once and feeds `--help`, the JSON schema and the docs. Names are
those of transformers, PEFT and bitsandbytes. `None` and "auto" mean that ftlevel chooses and shows
its choice with the reason.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ftlevel.config.gate import GateConfig
from ftlevel.config.options.decoding import Decoding
from ftlevel.config.options.optimizer import Optimizer, Schedule
from ftlevel.config.options.pairs import ClassWeights, FewNames, Scalars
from ftlevel.config.section import Section as Section

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Steps = Positive | Annotated[float, Field(gt=0.0, lt=1.0)]
"""A number of steps, or below 1 their share of the run, as in transformers."""

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

    @property
    def form(self) -> str:
        """The quantized form in a few words."""
        if self.kind != "4bit":
            return "8-bit LLM.int8()" if self.kind == "8bit" else "not quantized"
        return f"4-bit {self.quant_type}" + (", double quantization" if self.double_quant else "")


class DataConfig(Section):
    """Where the examples come from and how a row becomes tokens."""

    dataset: str = Field(
        DEFAULT_DATASET,
        min_length=1,
        description="Local file or directory, Hub id, or builtin:docstrings; repeatable.",
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
    subset: str | None = Field(None, description="Configuration (subset) of a Hub data set.")
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
    validation_file: str | None = Field(
        None,
        min_length=1,
        description="File, directory or Hub id whose rows are the validation rows, in place of "
        "those that come with the data set.",
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


class TrainerConfig(Decoding):
    """The optimisation; names are those of `transformers.TrainingArguments`."""

    num_train_epochs: float = Field(
        3.0, gt=0, le=10_000, description="How often the training rows are gone through."
    )
    max_steps: Positive | None = Field(
        None, description="Stop after N optimizer steps, whatever the epochs say."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Peak learning rate; the default depends on the method, the model's kind and "
        "width, and the length of the run.",
    )
    head_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Peak learning rate of a new head; the default is learning_rate where that is "
        "given, and else one of its own.",
    )
    lr_scheduler_type: Schedule = Field(
        "linear", description="How the learning rate goes on after its peak."
    )
    lr_scheduler_kwargs: Scalars = Field(
        default_factory=dict,
        description="Settings of that schedule by transformers' names, as in num_cycles=3 or "
        "min_lr_rate=0.1.",
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Steps of warm-up, or below 1 their share of all steps."
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Weight decay; AdamW's is decoupled from the gradient."
    )
    adam_beta1: Share = Field(0.9, description="Decay of AdamW's mean of the gradients.")
    adam_beta2: Share = Field(0.999, description="Decay of AdamW's mean of their squares.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-8, description="What AdamW adds to the root of that mean."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm; 0 is off.")
    label_smoothing_factor: Share = Field(
        0.0,
        description="Share of each target's probability that is spread over all others, in "
        "training alone: what is evaluated is the plain loss.",
    )
    class_weights: ClassWeights = None
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="Focal loss: a target's loss is multiplied by (1 - its probability) to this "
        "power (Lin et al., 2017), in training alone; 0 is off.",
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Add noise to the embeddings in training (NEFTune, Jain et al., 2023), which "
        "needs the plain step.",
    )
    optim: Optimizer = Field(
        "adamw_torch_fused", description="Optimizer, by transformers' name, and its default."
    )
    optim_args: Scalars = Field(
        default_factory=dict,
        description="Settings of that optimizer by its own names, as in momentum=0.9.",
    )
    per_device_train_batch_size: Positive = Field(8, description="Rows a device and micro-step.")
    per_device_eval_batch_size: Positive | None = Field(
        None, description="Rows a device in evaluation; the default is the training batch."
    )
    gradient_accumulation_steps: Positive = Field(
        1, description="Micro-steps that make one optimizer step."
    )
    num_processes: Positive | None = Field(
        None,
        description="Processes that train together, each on a device of its own, and each with "
        "per_device_train_batch_size rows; the default is one, or as torchrun started them.",
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = Field(
        "random",
        description="Order of the rows in an epoch; group_by_length puts rows of like length into "
        "a step, which saves padding where rows cannot be packed.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Seed of the weights, the dropout and the data order."
    )
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the order of the rows alone; the default is the other one."
    )
    logging_steps: Steps | None = Field(
        None,
        description="Log every N steps, or below 1 every such share of the run; the default is "
        "about 20 times a run.",
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="Evaluate every eval_steps, at the end of each epoch or not at all: steps, "
        "epoch, no; the default is steps where eval_steps is given, else epoch.",
    )
    eval_steps: Steps | None = Field(
        None,
        description="Evaluate every N steps, or below 1 every such share of the run; the default "
        "is at the end of each epoch.",
    )
    eval_on_start: bool = Field(False, description="Evaluate the untrained model first.")
    save_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="Write checkpoints every save_steps, at the end of each epoch or none before "
        "the end: steps, epoch, no; the default is steps where save_steps is given, else no.",
    )
    save_steps: Steps | None = Field(
        None,
        description="Write a checkpoint every N steps, or below 1 every such share of the run; the "
        "default is none before the end.",
    )
    save_total_limit: Positive = Field(2, description="How many checkpoints are kept.")
    metrics: FewNames = Field(
        (),
        description="Metrics that an evaluation gives beside the loss, with commas between; the "
        "default is all of the task.",
    )
    predict_with_generate: bool | None = Field(
        None,
        description="Score generated text (ROUGE) in evaluation; the default is by the task.",
    )
    max_generate_samples: Positive = Field(
        32, description="How many validation rows are generated for scoring."
    )
    max_new_tokens: Positive = Field(64, description="Longest generated text in tokens.")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed
