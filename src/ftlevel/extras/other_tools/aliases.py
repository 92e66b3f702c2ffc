"""Flags and values of other training tools, in terms of ftlevel's command line.

`UNSUPPORTED_FLAGS` have no counterpart; only values that describe what ftlevel does anyway are
accepted. Converters raise ValueError for values without a counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftlevel.config.flag import Alias, FlagAliases, NoOpValue, UnsupportedFlag, ValueAliases
from ftlevel.config.methods import SPECS
from ftlevel.config.reading import METHOD_ALIASES

_ON = ("train", "preview")


def _flags(
    names: str,
    message: str,
    values: Mapping[str, str | NoOpValue] | None = None,
    on: Sequence[str] = _ON,
) -> list[UnsupportedFlag]:
    """Returns an unsupported flag for each of `names`; `values` are accepted without error."""
    aliases = FlagAliases(values=values or {})
    return [
        UnsupportedFlag(names=n, on=on, aliases=aliases, message=message) for n in names.split()
    ]


_PACKED = NoOpValue(
    "rows of a micro-batch are packed without padding, each attending to itself only, if the "
    "model supports it; see the line `step`",
    "speed.fast",
    (True,),
    fix="Drop --no-fast, or drop it",
)
_ANSWERS_ONLY = NoOpValue(
    "the loss covers answers only, if a row has a prompt",
    "data.train_on_inputs",
    (False,),
    fix="Drop --train-on-inputs, or drop it",
)
_NO_WORKERS = NoOpValue("rows are encoded before the run and batched on demand")
_NO_REWARDS = "use --task preference, reward or rl. Drop it."
_SAMPLED = "it would sample from another distribution than the one that is trained. Drop it."
_STAGES = {
    stage: f"--task preference --loss {loss}"
    for stage, loss in (
        *((name, name) for name in ("dpo", "kto", "orpo", "simpo", "cpo")),
        ("rm", "reward"),
    )
} | {"grpo": "--task rl", "rloo": "--task rl --loss rloo"}
_TRACKER = "the tracker reads this from an environment variable. Set that, and drop the flag."
_HUB = (
    "--push-to-hub NAME uploads the adapter once, at the end of the run. Use that, or "
    "`hf upload` for anything else."
)
_TOKEN = "the token of `hf auth login` is used. Log in, and drop the flag."
_LAUNCH = (
    "use --num-processes N for several GPUs, and --shard full for a model that does not fit on "
    "one. Drop it."
)
_LONG_ROWS = (
    "each row is computed by one device: torch's context parallel attention takes no packed rows. "
    "Long rows fit with --gradient-checkpointing, --offload-activations and --shard full. Drop it."
)
_TOKENIZER = "the model's tokenizer is used unchanged. Drop it."
_OTHER_METHOD = "this method is not available; see ftlevel list-methods. Drop it."


def _drawn(path: str) -> NoOpValue:
    return NoOpValue(
        "tokens are drawn at --temperature", path, excluded=(0.0, None), fix="Add --temperature 1"
    )


def _no_op_if_greedy(path: str) -> NoOpValue:
    return NoOpValue("decoding is greedy", path, (0.0, None), fix="Drop --temperature")


UNSUPPORTED_FLAGS: tuple[UnsupportedFlag, ...] = (
    # Flags that agree with what ftlevel does.
    *_flags("--do-train", "ftlevel evaluate scores without training.",
            {"true": NoOpValue("ftlevel train trains")}),
    *_flags("--do-predict", "use ftlevel evaluate RUN --dataset TEST after training.",
            {"false": NoOpValue("a run does not use test rows")}),
    *_flags("--use-peft --use-peft-lora --use-lora", "--method full trains all weights. Use that.",
            {"true": NoOpValue("an adapter is trained", "method.kind",
                            ("lora", "qlora", "adalora", "ia3", "vera", "oft", "boft", "loha",
                             "lokr", "miss", "shira", "hira", "gralora", "c3a", "prefix",
                             "prompt", "p-tuning", "adapter", "ln-tuning")),
             "false": "--set method.kind=full"}),
    *_flags("--do-sample", "expected true or false.",
            {"true": _drawn("train.temperature"), "false": _no_op_if_greedy("train.temperature")}),
    *_flags("--do-sample", "expected true or false.",
            {"true": _drawn("temperature"), "false": _no_op_if_greedy("temperature")},
            on=("generate", "evaluate", "predict")),
    *_flags("--stage --rlhf-type", _NO_REWARDS,
            {**_STAGES,
             "sft": NoOpValue("that is what ftlevel train does"),
             "pt": NoOpValue("rows of plain text are fully supervised", "task",
                          ("text-generation",))}),
    *_flags("--packing --sample-packing --neat-packing --padding-free", "expected true or false.",
            {"true": _PACKED, "false": "--set speed.pack=false"}),
    *_flags("--eval-packing --eval-sample-packing", "expected true or false.",
            {"true": NoOpValue("validation rows are not padded to a fixed length"),
             "false": NoOpValue("each row is evaluated separately")}),
    *_flags("--remove-unused-columns", "unused columns are reported, not removed.",
            {"false": NoOpValue("unused columns are only reported")}),
    *_flags("--completion-only-loss --assistant-only-loss --train-on-completions --mask-prompt "
            "--train-on-responses-only", "expected true or false.",
            {"true": _ANSWERS_ONLY, "false": "--train-on-inputs true"}),
    *_flags("--mask-history", "all answers of a conversation are supervised. Drop it.",
            {"false": NoOpValue("all answers of a conversation are supervised")}),
    *_flags("--use-chat-template", "conversations use the model's chat template.",
            {"true": NoOpValue("conversations use the model's chat template")}),
    *_flags("--use-fast-tokenizer", "only fast tokenizers (with character offsets) are supported.",
            {"true": NoOpValue("the fast tokenizer is used if available")}),
    *_flags("--line-by-line", "--overlong split cuts long texts. Drop it.",
            {"true": NoOpValue("each row is a text of its own"), "false": "--overlong split"}),
    *_flags("--version-2-with-negative", "questions without an answer are detected in the data.",
            {"true": NoOpValue("unanswerable questions are supported")}),
    *_flags("--ignore-mismatched-sizes", "a head that does not fit is newly initialized.",
            {"true": NoOpValue("a head that does not fit is newly initialized and reported")}),
    *_flags("--pad-to-max-length --pad-to-sequence-len",
            "rows are never padded to --max-length, which would only cost time. Drop it.",
            {"false": NoOpValue("rows are not padded to the longest length")}),
    *_flags("--quant-method --quantization-method",
            "weights are quantized by bitsandbytes. Quantized checkpoints of other kinds are "
            "recognized by themselves. Drop it.",
            {word: NoOpValue("weights are quantized by bitsandbytes")
             for word in ("bnb", "bitsandbytes")}),
    *_flags("--use-reentrant --use-reentrant-gc",
            "activations are recomputed without reentrant autograd, which is exact. Drop it.",
            {"false": NoOpValue("activations are recomputed without reentrant autograd")}),
    *_flags("--save-only-model",
            "checkpoints are complete; use --save-strategy no to write none.",
            {"false": NoOpValue("checkpoints contain everything needed to resume")}),
    *_flags("--save-safetensors", "weights are saved as safetensors only. Drop it.",
            {"true": NoOpValue("weights are written as safetensors")}),
    *_flags("--logging-strategy", "--logging-steps says how often the loss is logged. Use that.",
            {"steps": NoOpValue("the loss is logged every --logging-steps")}),
    *_flags("--logging-first-step", "the first step is logged too. Drop it.",
            {"true": NoOpValue("the first step is logged")}),
    *_flags("--average-tokens-across-devices", "a loss is the mean over a step's tokens. Drop it.",
            {"true": NoOpValue("the loss of a step is the mean over its tokens on all devices")}),
    *_flags("--ddp-find-unused-parameters", "every trained weight gets a gradient. Drop it.",
            {"false": NoOpValue("every trained weight gets a gradient, which is checked")}),
    *_flags("--skip-prepare-dataset", "rows are always encoded by ftlevel. Drop it.",
            {"false": NoOpValue("rows are encoded by ftlevel")}),
    *_flags("--add-special-tokens --append-concat-token",
            "special tokens are those of the chat template or the tokenizer. Drop it.",
            {"false": NoOpValue("no token is added to those of the template or the tokenizer")}),
    *_flags("--compute-accuracy", "a task is scored by its own metrics.",
            {"true": NoOpValue("accuracy is reported for every task that has it")}),
    *_flags("--plot-loss", "the losses are in metrics.jsonl of the run. Drop it.",
            {"true": NoOpValue("the losses are in metrics.jsonl of the run, and on its screen")}),
    *_flags("--create-new-adapter", "--adapter continues from an adapter; without it a new one is "
                                    "created.",
            {"true": NoOpValue("a new adapter is created", "model.adapter", (None,))}),
    *_flags("--low-cpu-mem-usage", "weights are read tensor by tensor. Drop it.",
            {"true": NoOpValue("weights are read tensor by tensor")}),
    *_flags("--save-model", "the adapter is always saved. Drop it.",
            {"true": NoOpValue("the adapter is saved")}),
    *_flags("--use-unsloth --use-unsloth-gc --use-liger", "the fast step is ftlevel's. Drop it.",
            {"false": NoOpValue("the fast step is ftlevel's own")}),
    *_flags("--lora-mlp-kernel --lora-qkv-kernel --lora-o-kernel",
            "--set speed.fused_lora=false leaves LoRA's layers to PEFT.",
            {"true": NoOpValue("LoRA's layers are fused by the fast step", "speed.fused_lora",
                            (True,)),
             "false": "--set speed.fused_lora=false"}),
    # Unsupported flags.
    *_flags("--splits", "--split names the split to train on; the validation rows are the split "
            "called validation, valid, val or dev."),
    *_flags("--liger-rms-norm --liger-glu-activation --liger-layer-norm --liger-rope",
            "--liger-kernel uses all of them on a CUDA GPU. Use that."),
    *_flags("--loss-watchdog-threshold --loss-watchdog-patience",
            "a run stops at a gradient that is NaN or infinite, and at no other loss. Drop it."),
    *_flags("--plugins --strict --tuner-backend", "ftlevel loads no third-party code. Drop it."),
    *_flags("--hub-strategy --hub-path --push-gguf --push-dataset-to-hub", _HUB),
    *_flags("--hub-token --token --hf-token --hf-hub-token --use-auth-token", _TOKEN),
    *_flags("--wandb-entity --wandb-watch --wandb-log-model --wandb-token --wandb-mode "
            "--trackio-space-id --mlflow-tracking-uri", _TRACKER),
    *_flags("--tensorboard-dir --logging-dir",
            "TensorBoard's files are in RUN/tensorboard. Drop it: --output-dir names the run."),
    *_flags("--deepspeed --fsdp --fsdp-config --fsdp-version --ddp-timeout --ddp-backend "
            "--tensor-parallel-size --accelerate-config --config-file", _LAUNCH),
    *_flags("--context-parallel-size --context-parallel-degree --sequence-parallel-size "
            "--sequence-parallel-degree --parallelism-config-cp-size --cp-size", _LONG_ROWS,
            {"1": NoOpValue("a row is computed by one device")}),
    *_flags("--dataloader-num-workers --num-dataloader-workers --dataloader-prefetch-factor",
            "a number is expected; --num-proc N encodes with N processes.",
            {str(number): _NO_WORKERS for number in range(129)}),
    *_flags("--dataloader-pin-memory --dataloader-persistent-workers", "expected true or false.",
            dict.fromkeys(("true", "false"), _NO_WORKERS)),
    *_flags("--dataloader-drop-last", "the last incomplete batch is used too. Drop it.",
            {"false": NoOpValue("the last incomplete batch is used too")}),
    *_flags("--tokenizer-name --tokenizer-type --config-name --resize-vocab --add-tokens "
            "--special-tokens --eos-token --pad-token --split-special-tokens --eot-tokens "
            "--processor-type --tokenizer-use-mistral-common", _TOKENIZER),
    *_flags("--model-type", "the model type is read from the model's config. Drop it."),
    *_flags("--config-overrides --model-init-kwargs --rope-scaling",
            "these values are read from the model's config.json. Edit it, and drop the flag."),
    *_flags("--cache-dir", "set the environment variable HF_HOME, and drop the flag."),
    *_flags("--dataset-dir --dataset-prepared-path --tokenized-path",
            "name the file itself: --dataset FILE. Encoded rows are cached automatically."),
    *_flags("--streaming --dataset-streaming --buffer-size --shuffle-buffer-size",
            "rows are memory-mapped and encoded rows are cached on disk. Drop it.",
            {"false": NoOpValue("rows are memory-mapped")}),
    *_flags("--dataset-test-split --validation-split-name",
            "validation rows are the split validation, valid, val or dev; --validation-file names "
            "others."),
    *_flags("--test-file --max-predict-samples",
            "use ftlevel evaluate RUN --dataset TEST after training. Drop it."),
    *_flags("--num-labels", "the classes are counted in the data. Drop it."),
    *_flags("--source-prefix",
            "each task has its own instruction, also used by generate. Drop it; add text for "
            "every source to the data."),
    *_flags("--metric-name", "all metrics of the task are shown; --metrics selects some, and "
            "--metric-for-best-model the one for choosing the best checkpoint."),
    *_flags("--stride",
            "long texts are split without overlap by --overlong split. Use that."),
    *_flags("--loftq-config", "LoftQ is enabled by --init loftq --quant 4bit. Use that."),
    *_flags("--pissa-iter", "--init pissa_niter_16 is the fast form. Use that."),
    *_flags("--pissa-convert --convert-pissa-to-lora",
            "the adapter is always saved for the untouched base. Drop it."),
    *_flags("--loraplus-lr-embedding", "embeddings are not adapted. Drop it."),
    *_flags("--rank-dropout --module-dropout", "use --lora-dropout instead."),
    *_flags("--use-galore --use-apollo --use-badam --use-adam-mini --use-muon --use-llama-pro "
            "--freeze-trainable-layers --lisa-activated-layers --lorafa --unfrozen-parameters",
            _OTHER_METHOD),
    *_flags("--optim-target-modules", "GaLore and APOLLO are not supported. Drop it."),
    *_flags("--gradient-checkpointing-kwargs",
            "activations are recomputed without reentrant autograd. Drop it.",
            dict.fromkeys(('{"use_reentrant": false}', '{"use_reentrant":false}',
                           "use_reentrant=false"),
                          NoOpValue("activations are recomputed without reentrant autograd"))),
    *_flags("--torch-compile --torch-compile-backend --torch-compile-mode",
            "torch.compile is not supported; the fast step is on. Drop it."),
    *_flags("--auto-find-batch-size",
            "micro-batches are halved if they do not fit, and the batch size stays. Drop it."),
    *_flags("--full-determinism", "the same --seed gives the same adapter on a CPU. Drop it."),
    *_flags("--log-level --verbosity", "--quiet prints errors only. Use that.",
            {**dict.fromkeys(("passive", "info", "warning"),
                             NoOpValue("progress and warnings are shown")),
             **dict.fromkeys(("error", "critical"), "--quiet true")}),
    *_flags("--disable-tqdm", "expected true or false.",
            {"true": NoOpValue("a progress bar is shown in terminals only; --quiet prints errors "
                               "only"),
             "false": NoOpValue("progress is shown")}),
    *_flags("--bnb-4bit-quant-storage --bnb-4bit-quant-storage-dtype",
            "4-bit weights are always stored as bytes. Drop it.",
            {"uint8": NoOpValue("4-bit weights are stored as bytes")}),
    *_flags("--use-dft-loss --enable-dft-loss --use-eaft-loss",
            "the loss is cross-entropy over the answers' tokens. Drop it."),
    *_flags("--max-prompt-length",
            "--max-length is that of a prompt with its answer, or with --task rl with its longest "
            "completion. Use that."),
    *_flags("--top-k", _SAMPLED,
            dict.fromkeys(("0", "-1"), NoOpValue("tokens are drawn from the whole vocabulary"))),
    *_flags("--min-p", _SAMPLED, {"0": NoOpValue("tokens are drawn from the whole vocabulary"),
                                  "0.0": NoOpValue("tokens are drawn from the whole vocabulary")}),
    *_flags("--repetition-penalty", _SAMPLED,
            dict.fromkeys(("1", "1.0"), NoOpValue("no token is penalized"))),
    *_flags("--reward-weights", "weights belong to --reward. Write --reward NAME=WEIGHT."),
    *_flags("--steps-per-generation --generation-batch-size",
            "a batch of completions serves one optimizer step, or --num-iterations N. Drop it."),
    *_flags("--entropy-coef", "there is no entropy bonus. Drop it.",
            dict.fromkeys(("0", "0.0"), NoOpValue("there is no entropy bonus"))),
    *_flags("--delta", "the ratio is clipped by --epsilon and --epsilon-high. Use these."),
    *_flags("--disable-dropout", "expected true or false.", dict.fromkeys(
        ("true", "false"), NoOpValue("adapters have no dropout in rollouts and steps"))),
    *_flags("--log-completions", "completions are in rollouts.jsonl of the run. Drop it.",
            {"true": NoOpValue("completions are in rollouts.jsonl of the run")}),
    *_flags("--truncation-mode --truncation-side",
            "--overlong sets the action for rows that are too long. Use that."),
    *_flags("--mix-strategy", "--mix sets the share of each dataset. Use that."),
    *_flags("--model-author", "not supported. Drop it."),
    *_flags("--save-gguf --save-method --quantization --save-path",
            "after training, ftlevel export RUN writes a .gguf, and ftlevel merge RUN a model."),
    *_flags("--freeze-vision-tower --freeze-vit --image-max-pixels --video-max-pixels",
            "only text models are supported. Drop it."),
    *_flags("--use-vllm --vllm-mode --vllm-gpu-memory-utilization",
            "--task rl samples in the training process, or with a vLLM server: --rollouts URL. "
            "Drop it.",
            {"false": NoOpValue("the model is sampled here")}),
    *_flags("--use-hf", "models and data come from the Hugging Face Hub. Drop it."),
    *_flags("--config", "ftlevel train FILE reads a recipe; ftlevel recipes convert FILE converts "
            "files of Axolotl, LLaMA-Factory, ms-swift, TRL or verl."),
    *_flags("--merge-lora", "use ftlevel merge RUN after training. Drop it."),
    *_flags("--include-num-input-tokens-seen",
            "the tokens of a run are always counted in summary.json. Drop it.",
            dict.fromkeys(("", "true", "all", "non_padding"),
                          NoOpValue("summary.json counts the tokens of a run"))),
)  # fmt: skip
"""Unsupported flags of other tools."""


GLUE = ("ax", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def parse_percent(text: str) -> str:
    """Convert a percentage to a fraction: `5` is `0.05`."""
    try:
        return f"{float(text) / 100:g}"
    except ValueError:
        raise ValueError("expected a percentage, as in 5") from None


def parse_fraction(text: str) -> str:
    """Returns `text`, a fraction of the rows; raises ValueError for a number of rows."""
    if _number(text) >= 1:
        raise ValueError("expected a fraction below 1, as in 0.1; not a number of rows")
    return text


def parse_ratio(text: str) -> str:
    """Returns `text`, a fraction of the steps; raises ValueError for a number of steps."""
    if _number(text) >= 1:
        raise ValueError("a ratio is below 1; --warmup-steps N takes a number of steps")
    return text


def parse_min_fraction(text: str) -> str:
    """Convert Axolotl's `cosine_min_lr_ratio` to text: a scheduler and --lr-scheduler-kwargs."""
    _number(text)
    return f"cosine_with_min_lr --lr-scheduler-kwargs min_lr_rate={text}"


def parse_epoch_interval(text: str) -> str:
    """Returns "epoch" if `text` is 1, once per epoch; raises ValueError for other numbers."""
    if _number(text) == 1:
        return "epoch"
    raise ValueError(
        f"expected 1; for {text} times per epoch in E epochs, set --eval-steps or --save-steps to "
        f"the fraction 1/({text} × E), as in --eval-steps 0.25"
    )


def parse_template(text: str) -> str:
    """Convert a template name of LLaMA-Factory or Unsloth to a value of --chat-template."""
    known = ("llama-3", "mistral", "gemma", "qwen", "chatml")
    name = "llama-3" if text.strip().lower() == "llama3" else text.strip().lower()
    if name not in known and not name.endswith((".jinja", ".jinja2")):
        raise ValueError(
            f"the model's chat template is used. Drop it, or use --chat-template with "
            f"{', '.join(known)}, or a Jinja file"
        )
    return name if name in known else text


def parse_glue(text: str) -> str:
    """Convert a GLUE task to command-line text: a dataset, --subset and --task."""
    name = text.strip().lower()
    if name in GLUE:
        return f"nyu-mll/glue --subset {name} --task text-classification"
    if name in ("ner", "pos"):
        raise ValueError(f"{name} is a task: use --task {name}")
    raise ValueError(f"expected one of GLUE's: {', '.join(GLUE)}. Else --dataset names the data")


def reject_checkpoint(_: str) -> str:
    """Raise ValueError: a run resumes from its latest checkpoint only."""
    raise ValueError(
        "a run resumes from its newest valid checkpoint. Use: --output-dir RUN --resume"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


PRECISIONS = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "torch.float32", "no"), "float32"),
    "none": "auto",
}
BF16: ValueAliases = {
    "auto": "auto",
    "false": NoOpValue(
        "another precision was requested",
        "model.dtype",
        ("float32", "float16"),
        fix="Add --dtype float32: auto selects bfloat16 if the device supports it",
    ),
}
BITS = {
    "bf16": "none --dtype bfloat16",
    "fp16": "none --dtype float16",
    "fp32": "none --dtype float32",
    "16": "none",
    "32": "none --dtype float32",
}
ATTENTION = {
    **dict.fromkeys(("fa2", "flash", "flash_attn", "flash_attention"), "flash_attention_2"),
    "disabled": "eager",
}
OVERLONG = {"delete": "drop", "raise": "error"}
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
    "lion": "lion_32bit",
}
LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo-norm",
    "dpo_norm": "dpo-norm",
    "ld_dpo": "ld-dpo",
    "slic": "hinge",
    "rm": "reward",
    "dr-grpo": "dr_grpo",
    "reinforce_plus_plus": "reinforce++",
}
METHODS: ValueAliases = {
    spelling: f"--method {word}"
    for word in (*SPECS, *METHOD_ALIASES)
    for spelling in (word, word.replace("-", "_"))
}
"""Values of Axolotl's `adapter` that are methods → `--method NAME`; other values are paths."""
NO_LIMIT = NoOpValue("there is no limit besides the epochs", "train.max_steps", (None,))
DO_EVAL: ValueAliases = {
    "true": NoOpValue(
        "validation rows are evaluated at the end of each epoch",
        "train.eval_strategy",
        (None, "epoch", "steps"),
    ),
    "false": "no",
}
TO_PUSH = NoOpValue(
    "", "output.push_to_hub", excluded=(None,), fix="Name the repository: --push-to-hub NAME"
)
PUSH: ValueAliases = {
    "": TO_PUSH,
    "true": TO_PUSH,
    "false": NoOpValue("nothing is uploaded", "output.push_to_hub", (None,)),
}
FRACTIONS = (
    "--val-size",
    "--val-set-size",
    "--split-dataset-ratio",
    "--test-split-size",
    "--eval-size",
)
COLUMNS = tuple(
    Alias(name, convert=f"{role}={{}}".format)
    for role, names in {
        "text": (
            "--text-column",
            "--text-column-name",
            "--text-column-names",
            "--content-column",
            "--dataset-text-field",
        ),
        "summary": ("--summary-column",),
        "label": ("--label-column-name", "--label-column"),
        "context": ("--context-column",),
        "question": ("--question-column",),
        "answers": ("--answer-column",),
        "prompt": ("--prompt-column", "--query-column"),
        "completion": ("--response-column", "--completion-column"),
        "messages": ("--messages-column",),
    }.items()
    for name in names
)


def _also(names: str, *others: Alias, values: ValueAliases | None = None) -> FlagAliases:
    return FlagAliases((*names.split(), *others), values or {})


ALIASES: dict[str, FlagAliases] = {
    "model.name_or_path": _also(
        "--model-name-or-path --model-name --base-model --base-model-name-or-path "
        "--pretrained-model-name-or-path --model-id"
    ),
    "data.dataset": _also(
        "--dataset-name --dataset-name-or-path --train-file --train-dataset --data-path "
        "--data-files --local-dataset --raw-text-file --datasets",
        Alias("--task-name", convert=parse_glue),
    ),
    "task": _also("--task-type --lora-task-type"),
    "method.kind": _also(
        "--peft-method --peft-type --finetuning-type --tuner-type --train-type --training-type"
    ),
    "quant.kind": _also(
        "--quantization-type --quantization-bit --quant-bits",
        Alias("--bits", values=BITS),
        Alias("--load-in-4bit", value="4bit"),
        Alias("--load-in-8bit", value="8bit"),
        Alias("--use-4bit-quantization", value="4bit"),
        Alias("--use-8bit-quantization", value="8bit"),
        Alias("--quantize", value="4bit"),
    ),
    "method.r": _also("--lora-rank --rank --r"),
    "train.num_train_epochs": _also("--epochs --num-epochs"),
    "train.learning_rate": _also("--lr"),
    "train.per_device_train_batch_size": _also(
        "--train-batch-size --batch-size --micro-batch-size --per-gpu-train-batch-size"
    ),
    "output.dir": _also("--save-dir --out --output"),
    "model.adapter": _also(
        "--adapter-name-or-path --adapters --lora-model-dir --resume-from-adapter", values=METHODS
    ),
    "model.dtype": _also(
        "--torch-dtype --bnb-4bit-compute-dtype --mixed-precision",
        Alias("--bf16", value="bfloat16", values=BF16),
        Alias("--fp16", value="float16"),
        Alias("--fp32", value="float32"),
        values=PRECISIONS,
    ),
    "model.device": _also(
        "--device-map", Alias("--use-cpu", value="cpu"), Alias("--no-cuda", value="cpu")
    ),
    "model.attn_implementation": _also(
        "--attn-impl --flash-attn",
        Alias("--use-flash-attn", "flash_attention_2"),
        Alias("--use-flash-attention-2", value="flash_attention_2"),
        Alias("--flash-attention", value="flash_attention_2"),
        values=ATTENTION,
    ),
    "model.revision": _also("--model-revision"),
    "quant.quant_type": _also("--bnb-4bit-quant-type"),
    "quant.double_quant": _also(
        "--bnb-4bit-use-double-quant --use-double-quant --use-nested-quant --use-bnb-nested-quant "
        "--double-quantization"
    ),
    "method.lora_alpha": _also("--alpha"),
    "method.target_modules": _also(
        "--lora-target-modules --lora-target --oft-target",
        Alias("--lora-target-linear", value="all-linear"),
        values={"all": "all-linear"},
    ),
    "method.target_parameters": _also("--lora-target-parameters"),
    "method.layers_to_transform": _also("--lora-layers-to-transform"),
    "method.bias": _also("--lora-bias"),
    "method.use_dora": _also("--use-dora --peft-use-dora"),
    "method.use_rslora": _also("--use-rslora --peft-use-rslora"),
    "method.init_lora_weights": _also(
        "--init-lora-weights --init-weights --peft-init-lora-weights",
        Alias("--pissa-init", value="pissa"),
        Alias("--use-loftq", value="loftq"),
        values={"true": "default"},
    ),
    "method.modules_to_save": _also(
        "--lora-modules-to-save --additional-target --peft-modules-to-save"
    ),
    "method.trainable_token_indices": _also(
        "--peft-trainable-token-indices --lora-trainable-token-indices"
    ),
    "method.lora_plus_ratio": _also("--loraplus-lr-ratio --lorap-lr-ratio"),
    "data.validation_file": _also("--eval-dataset --val-dataset --eval-file --test-dataset"),
    "data.mix": _also("--interleave-probs --interleave-prob"),
    "data.subset": _also("--dataset-config-name --dataset-config"),
    "data.split": _also("--dataset-train-split --train-split-name --dataset-split"),
    "data.format": _also("--format-type", values={"auto": ""}),
    "data.columns": _also("", *COLUMNS),
    "data.chat_template": _also(
        "--chat-template-path",
        Alias("--template", convert=parse_template),
        Alias("--chat-template-format", convert=parse_template),
    ),
    "data.system": _also("--default-system --system-prompt --system-message"),
    "data.train_on_inputs": _also("--train-on-prompt"),
    "data.max_length": _also(
        "--max-seq-length --model-max-length --max-seq-len --cutoff-len --seq-length "
        "--sequence-len --block-size --max-source-length --chunk-size"
    ),
    "data.max_target_length": _also("--val-max-target-length"),
    "data.overlong": _also(
        "",
        Alias("--truncation-strategy", values=OVERLONG),
        Alias("--excess-length-strategy", values=OVERLONG),
    ),
    "data.problem_type": _also("", Alias("--do-regression", value="regression")),
    "data.source_language": _also("--source-lang"),
    "data.target_language": _also("--target-lang"),
    "data.validation_split": _also(
        "",
        Alias("--validation-split-percentage", convert=parse_percent),
        *(Alias(name, convert=parse_fraction) for name in FRACTIONS),
    ),
    "data.max_samples": _also("--max-train-samples --num-train-samples --max-train-examples"),
    "data.max_eval_samples": _also("--max-eval-examples --num-eval-samples"),
    "data.cache": _also("--load-from-cache-file", Alias("--overwrite-cache", value="false")),
    "data.num_proc": _also("--preprocessing-num-workers --dataset-num-proc --dataset-processes"),
    "train.max_steps": _also("--max-train-steps", values={"-1": NO_LIMIT, "0": NO_LIMIT}),
    "train.head_learning_rate": _also("--head-lr --classifier-learning-rate"),
    "train.lr_scheduler_type": _also(
        "--lr-scheduler", Alias("--cosine-min-lr-ratio", convert=parse_min_fraction)
    ),
    "train.warmup_steps": _also(
        "--num-warmup-steps --lr-warmup-steps", Alias("--warmup-ratio", convert=parse_ratio)
    ),
    "train.optim": _also("--optimizer --optim-type", values=OPTIMIZERS),
    "train.label_smoothing_factor": _also("--label-smoothing"),
    "train.class_weights": _also("--class-weight"),
    "distillation.teacher": _also("--teacher-model --teacher-model-name-or-path"),
    "preference.loss": _also("--pref-loss --loss-type", values=LOSSES),
    "preference.beta": _also("--pref-beta --dpo-beta --kto-beta"),
    "preference.reference": _also("--ref-model"),
    "preference.sft_weight": _also("--rpo-alpha --cpo-alpha --pref-ftx"),
    "preference.desirable_weight": _also("--kto-chosen-weight"),
    "preference.undesirable_weight": _also("--kto-rejected-weight"),
    "embedding.pooling": _also("--pooling-mode"),
    "reranking.pos_weight": _also("--positive-weight"),
    "embedding.similarity": _also("", values={"dot_product": "dot"}),
    "train.per_device_eval_batch_size": _also("--eval-batch-size --per-gpu-eval-batch-size"),
    "train.train_sampling_strategy": _also("", Alias("--group-by-length", value="group_by_length")),
    "train.num_processes": _also("--nproc-per-node"),
    "train.gradient_checkpointing": _also(
        "--use-gradient-checkpointing --activation-checkpointing",
        Alias("--disable-gradient-checkpointing", value="false"),
        values={"unsloth": "true"},
    ),
    "speed.liger_kernel": _also("--use-liger-kernel --enable-liger-kernel"),
    "train.seed": _also("--random-state --random-seed"),
    "train.eval_strategy": _also(
        "--evaluation-strategy",
        Alias("--do-eval", value="", values=DO_EVAL),
        Alias("--evals-per-epoch", convert=parse_epoch_interval),
    ),
    "train.eval_steps": _also("--eval-step"),
    "train.early_stopping_patience": _also("--early-stopping-steps --early-stop-interval"),
    "train.max_new_tokens": _also("--generation-max-length"),
    "train.num_beams": _also("--eval-num-beams --generation-num-beams --beam-size"),
    "train.save_strategy": _also("", Alias("--saves-per-epoch", convert=parse_epoch_interval)),
    "train.save_steps": _also("--save-step --checkpointing-steps"),
    "output.overwrite": _also("--overwrite-output-dir"),
    "output.resume": _also(
        "--auto-resume", Alias("--resume-from-checkpoint", convert=reject_checkpoint)
    ),
    "output.run_name": _also("--wandb-name --wandb-run-name --trackio-run-name"),
    "output.report_to": _also(
        "",
        Alias("--enable-wandb", value="wandb"),
        Alias("--enable-tensorboard", value="tensorboard"),
    ),
    "output.tracker_project": _also(
        "--wandb-project --wandb-project-name --project --trackio-project-name "
        "--mlflow-experiment-name"
    ),
    "output.push_to_hub": _also("--hub-model-id --push-model", values=PUSH),
    "output.hub_private": _also("--hub-private-repo"),
}
"""Dotted field of a run → names and values of its flag in other tools."""


VERL = "verl"
AXOLOTL, LLAMA_FACTORY, MS_SWIFT, TRL = "Axolotl", "LLaMA-Factory", "ms-swift", "TRL"

_KEYS = {
    AXOLOTL: ("base_model",),
    LLAMA_FACTORY: ("finetuning_type", "stage", "cutoff_len"),
    MS_SWIFT: ("tuner_type", "train_type", "rlhf_type"),
    TRL: ("model_name_or_path", "dataset_name"),
}
"""Tool → top-level keys, any of which identifies its files."""


def detect_tool(values: Mapping[str, Any]) -> str:
    """Returns the tool whose configuration has these top-level keys, "" for an ftlevel recipe."""
    if "actor_rollout_ref" in values:
        return VERL
    if any(isinstance(values.get(key), Mapping) for key in ("model", "data", "train", "method")):
        return ""
    return next((tool for tool, keys in _KEYS.items() if set(keys) & set(values)), "")
