"""The table of flags: one row a flag, from which signatures, help, second names and docs are made.

Data only; `cli/flags.py` makes Typer's options of it and `scripts/write_docs.py` docs/cli.md. A
flag that sets a field takes its help, its choices, its default and its type from the field. What
other tools have and ftlevel has not is in `config/other_tools/answers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ftlevel.config.flag import CONFIGS as CONFIGS
from ftlevel.config.flag import DAILY as DAILY
from ftlevel.config.flag import DATA, HOW, MODEL, RUN, Flag, Spelling
from ftlevel.config.flag import GENERAL as GENERAL
from ftlevel.config.flags_of_commands import OF_COMMANDS
from ftlevel.config.other_tools.answers import ANSWERS
from ftlevel.config.other_tools.values import (
    read_glue,
    read_lowest_share,
    read_once_an_epoch,
    read_pairs,
    read_percent,
    read_ratio,
    read_share,
    read_template,
    refuse_checkpoint,
)
from ftlevel.config.other_tools.words import (
    ATTENTION,
    BF16,
    BITS,
    COLUMNS,
    DO_EVAL,
    LOSSES,
    METHODS,
    NO_LIMIT,
    OPTIMIZERS,
    OVERLONG,
    PRECISIONS,
    PUSH,
    SHARES,
)

_ROWS = ("train", "preview")
_LIKE_TRAIN = ("train", "preview", "plan", "compare", "launch")
AS_TRAIN = ("plan", "compare", "launch", "init")
"""Commands that take the flags of train."""
_EVERY = ("train", "preview", "plan", "compare", "launch", "report", "doctor", "init", "evaluate",
          "predict", "generate", "merge", "quantize", "export", "check-served", "list-targets",
          "list-methods", "recipes")  # fmt: skip
_QUIET = ("train", "compare", "merge", "quantize", "export", "check-served")
_TRACED = tuple(name for name in _EVERY if name != "preview")

FLAGS: tuple[Flag, ...] = (
    # Arguments.
    Flag(names="[RECIPE]", on=("train", "plan", "compare", "launch"), dest="recipe_file", type=Path,
         help="A recipe, or the config.yaml of a run."),
    Flag(names="[RECIPE|RUN]", on=("preview",), dest="recipe_file", type=Path,
         help="A recipe, or the directory of a run."),
    Flag("name", "RUN|ADAPTER|MODEL", on=("evaluate", "predict"), required=True),
    Flag("name", "RUN|ADAPTER|MODEL", on=("generate",)),
    Flag("adapters", "RUN|ADAPTER...", on=("merge",), required=True, type=list[str]),
    Flag(names="RUN...", on=("report",), dest="runs", required=True, type=list[Path],
         help="Directories of runs that are done."),
    Flag("model", "MODEL", on=("quantize",), required=True),
    Flag("model", "RUN|ADAPTER|MODEL", on=("export",), required=True),
    Flag("out", "OUT", on=("check-served",), required=True),
    Flag(names="ACTION", on=("recipes",), dest="action", required=True,
         help="What to do: list, show, copy or convert."),
    Flag(names="[FILE]", on=("recipes",), dest="file", type=Path,
         help="A recipe by name or path, or the file of another tool to convert."),
    Flag(names="[TO]", on=("recipes",), dest="target", type=Path,
         help="Where copy writes; the default is the recipe's name, here."),
    Flag(names="[FILE]", on=("init",), dest="file", type=Path, default=Path("recipe.yaml"),
         help="Where the recipe goes; must not exist."),
    Flag(names="MODEL|FAMILY", on=("list-targets",), dest="model", required=True,
         help="A directory, a .gguf file, a Hub id, builtin:NAME, or a family such as llama."),
    # The ten that nearly every run has.
    Flag("model.name_or_path", "--model", DAILY, _ROWS,
         also=("--model-name-or-path", "--model-name", "--base-model", "--base-model-name-or-path",
               "--pretrained-model-name-or-path", "--model-id")),
    Flag("data.dataset", "--dataset", DAILY, _ROWS, type=list[str], several=True, rest="data.also",
         also=("--dataset-name", "--dataset-name-or-path", "--train-file", "--train-dataset",
               "--data-path", "--data-files", "--local-dataset", "--raw-text-file", "--datasets",
               Spelling("--task-name", read=read_glue))),
    Flag("task", "--task", DAILY, _ROWS, also=("--task-type", "--lora-task-type")),
    Flag("method.kind", "--method", DAILY,
         also=("--peft-method", "--peft-type", "--finetuning-type", "--tuner-type", "--train-type",
               "--training-type")),
    Flag("quant.kind", "--quant", DAILY, noun="the quantization",
         also=("--quantization-type", "--quantization-bit", "--quant-bits",
               Spelling("--bits", values=BITS), Spelling("--load-in-4bit", value="4bit"),
               Spelling("--load-in-8bit", value="8bit"),
               Spelling("--use-4bit-quantization", value="4bit"),
               Spelling("--use-8bit-quantization", value="8bit"),
               Spelling("--quantize", value="4bit"))),
    Flag("method.r", "--lora-r", DAILY, also=("--lora-rank", "--rank", "--r")),
    Flag("train.num_train_epochs", "", DAILY, _ROWS, also=("--epochs", "--num-epochs")),
    Flag("train.learning_rate", "", DAILY, also=("--lr",)),
    Flag("train.per_device_train_batch_size", "", DAILY, _ROWS,
         also=("--train-batch-size", "--batch-size", "--micro-batch-size",
               "--per-gpu-train-batch-size")),
    Flag("output.dir", "--output-dir -o", DAILY, ("train", "compare"),
         also=("--save-dir", "--out", "--output")),
    # What is trained.
    Flag("model.adapter", "--adapter", MODEL, metavar="RUN|ADAPTER", words=METHODS,
         also=("--adapter-name-or-path", "--adapters", "--lora-model-dir",
               "--resume-from-adapter")),
    Flag("model.dtype", "", MODEL, noun="the precision", words=PRECISIONS,
         also=("--torch-dtype", "--bnb-4bit-compute-dtype", "--mixed-precision",
               Spelling("--bf16", value="bfloat16", values=BF16),
               Spelling("--fp16", value="float16"), Spelling("--fp32", value="float32"))),
    Flag("model.device", "", MODEL, also=("--device-map", Spelling("--use-cpu", value="cpu"),
         Spelling("--no-cuda", value="cpu"))),
    Flag("model.attn_implementation", "", MODEL, words=ATTENTION,
         also=("--attn-impl", "--flash-attn", Spelling("--use-flash-attn", "flash_attention_2"),
               Spelling("--use-flash-attention-2", value="flash_attention_2"),
               Spelling("--flash-attention", value="flash_attention_2"))),
    Flag("model.revision", "", MODEL, _ROWS, also=("--model-revision",)),
    Flag("model.trust_remote_code", "", MODEL, _ROWS),
    Flag("quant.quant_type", "", MODEL, also=("--bnb-4bit-quant-type",)),
    Flag("quant.double_quant", "", MODEL,
         also=("--bnb-4bit-use-double-quant", "--use-double-quant", "--use-nested-quant",
               "--use-bnb-nested-quant", "--double-quantization")),
    Flag("method.lora_alpha", "", MODEL, also=("--alpha",)),
    Flag("method.lora_dropout", "", MODEL),
    Flag("method.target_modules", "", MODEL, several=True, words={"all": "all-linear"},
         also=("--lora-target-modules", "--lora-target", "--oft-target",
               Spelling("--lora-target-linear", value="all-linear"))),
    Flag("method.target_parameters", "", MODEL, several=True, also=("--lora-target-parameters",)),
    Flag("method.layers_to_transform", "", MODEL, several=True,
         also=("--lora-layers-to-transform",)),
    Flag("method.bias", "", MODEL, also=("--lora-bias",)),
    Flag("method.use_dora", "--dora/--no-dora", MODEL, also=("--use-dora", "--peft-use-dora")),
    Flag("method.use_rslora", "--rslora/--no-rslora", MODEL,
         also=("--use-rslora", "--peft-use-rslora")),
    Flag("method.init_lora_weights", "--init", MODEL, words={"true": "default"},
         also=("--init-lora-weights", "--init-weights", "--peft-init-lora-weights",
               Spelling("--pissa-init", value="pissa"), Spelling("--use-loftq", value="loftq"))),
    Flag("method.modules_to_save", "", MODEL, several=True,
         also=("--lora-modules-to-save", "--additional-target", "--peft-modules-to-save")),
    Flag("method.trainable_token_indices", "", MODEL, several=True,
         also=("--peft-trainable-token-indices", "--lora-trainable-token-indices")),
    Flag("method.lora_plus_ratio", "", MODEL, also=("--loraplus-lr-ratio", "--lorap-lr-ratio")),
    # Its data.
    Flag("data.validation_file", "", DATA, _ROWS,
         also=("--eval-dataset", "--val-dataset", "--eval-file", "--test-dataset")),
    Flag("data.mix", "", DATA, _ROWS, several=True, also=("--interleave-probs",
         "--interleave-prob")),
    Flag("data.input_format", "", DATA, _ROWS),
    Flag("data.subset", "", DATA, _ROWS, also=("--dataset-config-name", "--dataset-config")),
    Flag("data.split", "", DATA, _ROWS,
         also=("--dataset-train-split", "--train-split-name", "--dataset-split")),
    Flag("data.format", "", DATA, _ROWS, also=("--format-type",), words={"auto": ""}),
    Flag("data.columns", "--map", DATA, _ROWS, metavar="NAME=COLUMN", example="summary=abstract",
         also=COLUMNS),
    Flag("data.ignore_columns", "", DATA, _ROWS, several=True, metavar="COLUMN"),
    Flag("data.chat_template", "", DATA, _ROWS,
         also=("--chat-template-path", Spelling("--template", read=read_template),
               Spelling("--chat-template-format", read=read_template))),
    Flag("data.system", "", DATA, _ROWS, metavar="TEXT",
         also=("--default-system", "--system-prompt", "--system-message")),
    Flag("data.train_on_inputs", "", DATA, _ROWS, also=("--train-on-prompt",)),
    Flag("data.max_length", "", DATA, _ROWS,
         also=("--max-seq-length", "--model-max-length", "--max-seq-len", "--cutoff-len",
               "--seq-length", "--sequence-len", "--block-size", "--max-source-length",
               "--chunk-size")),
    Flag("data.max_target_length", "", DATA, _ROWS, also=("--val-max-target-length",)),
    Flag("data.overlong", "", DATA, _ROWS,
         also=(Spelling("--truncation-strategy", values=OVERLONG),
               Spelling("--excess-length-strategy", values=OVERLONG))),
    Flag("data.doc_stride", "", DATA, _ROWS),
    Flag("data.mlm_probability", "", DATA, _ROWS),
    Flag("data.problem_type", "", DATA, _ROWS,
         also=(Spelling("--do-regression", value="regression"),)),
    Flag("data.source_language", "", DATA, _ROWS, also=("--source-lang",)),
    Flag("data.target_language", "", DATA, _ROWS, also=("--target-lang",)),
    Flag("data.validation_split", "", DATA, _ROWS, noun="the validation rows",
         also=(Spelling("--validation-split-percentage", read=read_percent),
               *(Spelling(name, read=read_share) for name in SHARES))),
    Flag("data.max_samples", "", DATA, _ROWS, also=("--max-train-samples", "--num-train-samples",
         "--max-train-examples")),
    Flag("data.max_eval_samples", "", DATA, _ROWS, also=("--max-eval-examples",
         "--num-eval-samples")),
    Flag("data.streaming", "", DATA, _ROWS, also=("--dataset-streaming",)),
    Flag("data.shuffle_buffer", "", DATA, _ROWS, also=("--buffer-size", "--shuffle-buffer-size")),
    Flag("data.cache", "", DATA, _ROWS,
         also=("--load-from-cache-file", Spelling("--overwrite-cache", value="false"))),
    Flag("data.num_proc", "", DATA, _ROWS,
         also=("--preprocessing-num-workers", "--dataset-num-proc", "--dataset-processes")),
    Flag("data.on_bad_row", "", DATA, _ROWS),
    # How it is trained.
    Flag("train.max_steps", "", HOW, _ROWS, also=("--max-train-steps",),
         words={"-1": NO_LIMIT, "0": NO_LIMIT}),
    Flag("train.head_learning_rate", "", HOW, also=("--head-lr", "--classifier-learning-rate")),
    Flag("train.lr_scheduler_type", "", HOW,
         also=("--lr-scheduler", Spelling("--cosine-min-lr-ratio", read=read_lowest_share))),
    Flag("train.lr_scheduler_kwargs", "", HOW, metavar="NAME=VALUE", example="num_cycles=3",
         read=partial(read_pairs, "--lr-scheduler-kwargs")),
    Flag("train.warmup_steps", "", HOW, noun="the warm-up",
         also=("--num-warmup-steps", "--lr-warmup-steps",
               Spelling("--warmup-ratio", read=read_ratio))),
    Flag("train.optim", "", HOW, also=("--optimizer", "--optim-type"), words=OPTIMIZERS),
    Flag("train.optim_args", "", HOW, metavar="NAME=VALUE", example="momentum=0.9",
         read=partial(read_pairs, "--optim-args")),
    Flag("train.weight_decay", "", HOW),
    Flag("train.adam_beta1", "", HOW),
    Flag("train.adam_beta2", "", HOW),
    Flag("train.adam_epsilon", "", HOW),
    Flag("train.max_grad_norm", "", HOW),
    Flag("train.on_nonfinite", "", HOW),
    Flag("train.spike_factor", "", HOW),
    Flag("train.label_smoothing_factor", "", HOW, also=("--label-smoothing",)),
    Flag("train.class_weights", "", HOW, metavar="balanced|NAME=W,…", also=("--class-weight",)),
    Flag("train.focal_gamma", "", HOW),
    Flag("train.neftune_noise_alpha", "", HOW),
    Flag("distillation.teacher", "", HOW, also=("--teacher-model", "--teacher-model-name-or-path")),
    Flag("distillation.divergence", "", HOW),
    Flag("distillation.kd_ratio", "", HOW),
    Flag("distillation.kd_temperature", "", HOW),
    Flag("distillation.kd_top_k", "", HOW),
    Flag("preference.loss", "", HOW, words=LOSSES,
         also=("--pref-loss", "--loss-type")),
    Flag("preference.beta", "", HOW, also=("--pref-beta", "--dpo-beta", "--kto-beta")),
    Flag("preference.reference", "", HOW, metavar="start|none|RUN", also=("--ref-model",)),
    Flag("preference.simpo_gamma", "", HOW),
    Flag("preference.sft_weight", "", HOW, also=("--rpo-alpha", "--cpo-alpha", "--pref-ftx")),
    Flag("preference.desirable_weight", "", HOW, also=("--kto-chosen-weight",)),
    Flag("preference.undesirable_weight", "", HOW, also=("--kto-rejected-weight",)),
    Flag("train.gradient_accumulation_steps", "", HOW, _ROWS),
    Flag("train.per_device_eval_batch_size", "", HOW,
         also=("--eval-batch-size", "--per-gpu-eval-batch-size")),
    Flag("train.train_sampling_strategy", "", HOW,
         also=(Spelling("--group-by-length", value="group_by_length"),)),
    Flag("train.num_processes", "", HOW, also=("--nproc-per-node",)),
    Flag("train.shard", "", HOW),
    Flag("train.max_restarts", "", HOW),
    Flag("train.gradient_checkpointing", "", HOW, words={"unsloth": "true", "auto": "auto"},
         also=("--use-gradient-checkpointing", "--activation-checkpointing",
               Spelling("--disable-gradient-checkpointing", value="false"))),
    Flag("train.offload_activations", "", HOW),
    Flag("train.tf32", "", HOW),
    Flag("speed.fast", "", HOW),
    Flag("speed.tokens_per_micro_batch", "", HOW, metavar="N|auto|memory",
         also=(Spelling("--auto-micro-batch", value="memory"),)),
    Flag("speed.liger_kernel", "--liger-kernel/--no-liger-kernel", HOW,
         also=("--use-liger-kernel", "--enable-liger-kernel")),
    Flag("speed.verify", "--verify-fast/--no-verify-fast", HOW),
    Flag("train.seed", "", HOW, also=("--random-state", "--random-seed")),
    Flag("train.data_seed", "", HOW),
    Flag("train.logging_steps", "", HOW),
    Flag("train.eval_strategy", "", HOW,
         also=("--evaluation-strategy", Spelling("--do-eval", value="", values=DO_EVAL),
               Spelling("--evals-per-epoch", read=read_once_an_epoch))),
    Flag("train.eval_steps", "", HOW, also=("--eval-step",)),
    Flag("train.eval_on_start", "", HOW),
    Flag("train.load_best_model_at_end", "", HOW),
    Flag("train.metric_for_best_model", "", HOW),
    Flag("train.greater_is_better", "", HOW),
    Flag("train.early_stopping_patience", "", HOW,
         also=("--early-stopping-steps", "--early-stop-interval")),
    Flag("train.early_stopping_threshold", "", HOW),
    Flag("train.metrics", "", HOW, several=True),
    Flag("train.predict_with_generate", "", HOW),
    Flag("train.max_new_tokens", "", HOW, also=("--generation-max-length",)),
    Flag("train.num_beams", "", HOW,
         also=("--eval-num-beams", "--generation-num-beams", "--beam-size")),
    Flag("train.temperature", "", HOW),
    Flag("train.top_p", "", HOW),
    # The run.
    Flag(names="--recipe", panel=RUN, on=_LIKE_TRAIN, type=Path,
         help="A recipe; flags win over it."),
    Flag(names="--set", panel=RUN, on=(*_LIKE_TRAIN, "init"), type=list[str], metavar="KEY=VALUE",
         dest="settings", help="Set any field; repeatable."),
    Flag("train.save_strategy", "", RUN,
         also=(Spelling("--saves-per-epoch", read=read_once_an_epoch),)),
    Flag("train.save_steps", "", RUN, also=("--save-step", "--checkpointing-steps")),
    Flag("train.save_minutes", "", RUN),
    Flag("train.save_total_limit", "", RUN),
    Flag("output.overwrite", "", RUN, also=("--overwrite-output-dir",)),
    Flag("output.resume", "", RUN, ("train", "compare"),
         also=(Spelling("--resume-from-checkpoint", read=refuse_checkpoint), "--auto-resume")),
    Flag("output.allow_change", "", RUN, type=list[str], several=True, metavar="FIELD"),
    Flag("output.run_name", "", RUN,
         also=("--wandb-name", "--wandb-run-name", "--trackio-run-name")),
    Flag("output.report_to", "", RUN, several=True,
         also=(Spelling("--enable-wandb", value="wandb"),
               Spelling("--enable-tensorboard", value="tensorboard"))),
    Flag("output.tracker_project", "", RUN,
         also=("--wandb-project", "--wandb-project-name", "--project", "--trackio-project-name",
               "--mlflow-experiment-name")),
    Flag("output.push_to_hub", "", RUN, metavar="NAME", words=PUSH,
         also=("--hub-model-id", "--push-model")),
    Flag("output.hub_private", "", RUN, also=("--hub-private-repo",)),
    Flag(names="--dry-run", panel=RUN, type=bool,
         help="Resolve, check and show; train nothing."),
    *OF_COMMANDS,
    # list-targets and list-methods
    Flag(names="--lora-r", panel=GENERAL, on=("list-targets",), type=int, default=8, minimum=1,
         help="The rank to count for."),
    Flag(names="--model", panel=GENERAL, on=("list-methods",), metavar="MODEL|FAMILY",
         help="Only what this model can take."),
    Flag(names="--task", panel=GENERAL, on=("list-methods",), help="Only what this task can be."),
    Flag(names="--quant", panel=GENERAL, on=("list-methods",),
         help="On a base of: none, 4bit, 8bit."),
    # What programs are told, and how much is said.
    Flag(names="--json", panel=GENERAL, on=_EVERY, type=bool, dest="as_json",
         help="Print one JSON object, nothing else."),
    Flag(names="--quiet -q", panel=GENERAL, on=_QUIET, type=bool, help="Print errors only."),
    Flag(names="--quiet -q", panel=GENERAL, on=("evaluate",), type=bool,
         help="Print the metrics only."),
    Flag(names="--help-all", panel=GENERAL, on=(*_LIKE_TRAIN, "init"), type=bool,
         help="Show every flag."),
    Flag(names="--quiet -q", panel=GENERAL, on=("predict",), type=bool,
         help="Print warnings and errors only."),
    Flag(names="--schema", panel=GENERAL, type=bool, help="Print the JSON schema of recipes."),
    Flag(names="--traceback", panel=GENERAL, on=_TRACED, type=bool,
         help="Show where an error arose."),
    *ANSWERS,
)  # fmt: skip


def flags_of(command: str, flags: Sequence[Flag] = FLAGS) -> list[Flag]:
    """Return the flags that `command` has."""
    if command in AS_TRAIN:
        train = [flag for flag in flags if "train" in flag.on and _is_of_the_run(flag)]
        if command == "launch":  # a job says where it writes
            train = [flag for flag in flags if "train" in flag.on and flag.path]
        if command == "compare":  # which has --methods
            train = [flag for flag in train if flag.path != "method.kind"]
        flags = [flag for flag in flags if flag in train or command in flag.on]
        return [flag for flag in flags if not flag.answer]
    return [flag for flag in flags if command in flag.on and not flag.answer]


def recipe_hint(name: str, command: str = "train") -> str:
    """Return which key the flag of `command` called `name` sets, as the end of an error.

    A name that stands for a value has it too, as `load_in_4bit` is `quant.kind: 4bit`. Empty where
    no flag has this name.
    """
    typed = "--" + name.lower().replace("_", "-")
    for flag in FLAGS:
        if command not in flag.on or flag.is_argument:
            continue
        values = {part: "" for given in flag.declared(is_switch=False) for part in given.split("/")}
        values |= {other.name: other.value or "" for other in flag.spellings}
        if typed not in values:
            continue
        if not flag.path:
            return f" It is a flag of the command line, not a key: {typed}."
        value = f": {values[typed]}" if values[typed] else ""
        return f" Did you mean {flag.path + value!r}?"
    return ""


def _is_of_the_run(flag: Flag) -> bool:
    """Whether `flag` says something of a run but where it is written."""
    return bool(flag.path) and not flag.path.startswith("output.")
