"""Table of all flags; signatures of commands, help and docs are generated from it.

A flag that sets a configuration field takes help, choices, default and type from the field.
Extensions can add flags, and aliases for the flags of train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from ftlevel.config.constraints import Constraint
from ftlevel.config.flag import (
    COMPARE,
    DAILY,
    DATA,
    GENERAL,
    HOW,
    INFERENCE,
    MODEL,
    RUN,
    WRITE,
    Flag,
    FlagAliases,
    UnsupportedFlag,
    command_of,
    option,
)
from ftlevel.config.flag import CONFIGS as CONFIGS
from ftlevel.config.train import SECTIONS
from ftlevel.errors import ConfigError
from ftlevel.extensions import OWN, Command, added_rows, find_extensions, warn_skipped


def convert_pairs(flag: str, text: str) -> str:
    """Convert `a=1,b=2`, or a JSON object, to arguments of a repeated `flag`: `a=1 FLAG b=2`."""
    if not text.lstrip().startswith("{"):
        return f" {flag} ".join(pair.strip() for pair in text.split(",") if pair.strip())
    try:
        pairs = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return f" {flag} ".join(f"{name}={str(value).strip()}" for name, value in pairs.items())


def _fields(panel: str, on: Sequence[str], paths: str) -> list[Flag]:
    """Returns flags of the commands `on`, one per field in `paths`, which are split at spaces."""
    return [Flag(path, "", panel, on) for path in paths.split()]


_TRAIN, _ROWS = ("train",), ("train", "preview")

COMMAND_FLAGS: tuple[Flag, ...] = (
    # preview
    option("--row", "Row number to show, from 1, in the order of the files; repeatable.",
           panel=WRITE, on=("preview",), type=list[int], metavar="N", minimum=1),
    option("--html", "HTML page to write; self-contained, needs no network.",
           panel=WRITE, on=("preview",), type=Path, metavar="FILE"),
    # plan
    option("--gpu", "Target GPU (h100, a100, l4, rtx4090, …) or its memory, e.g. 24GB.",
           panel=DAILY, on=("plan",), metavar="NAME|SIZE"),
    option("--probe", "Whether to load the model and time a few real steps.",
           panel=DAILY, on=("plan",), type=bool),
    option("--price-per-hour", "Price of the machine per hour, to estimate the cost of the run.",
           panel=DAILY, on=("plan",), type=float, metavar="N"),
    option("--brief", "Whether to skip the table of alternatives, which takes most of the time.",
           panel=DAILY, on=("plan",), type=bool),
    # init
    option("--yes -y", "Whether to accept all proposed answers without asking.",
           panel=GENERAL, on=("init",), type=bool),
    # doctor
    option("--quiet -q", "Whether to print only findings that need action.",
           panel=GENERAL, on=("doctor",), type=bool),
    # predict
    Flag("dataset", "--dataset", DATA, ("predict",), metavar="FILE|-", required=True),
    Flag("input_format", "", DATA, ("predict", "evaluate")),
    *_fields(DATA, ("predict",), "format limit overlong"),
    Flag("on_bad_row", "", DATA, ("predict", "evaluate")),
    Flag("output", "--output -o", WRITE, ("predict",), FlagAliases(("--out",)), "FILE"),
    Flag("column", "", WRITE, ("predict",)),
    Flag("probabilities", "--probabilities", WRITE, ("predict",)),
    Flag("top_k", "", WRITE, ("predict",)),
    Flag("normalize", "--normalize/--no-normalize", WRITE, ("predict",)),
    Flag("dims", "", WRITE, ("predict",)),
    Flag("resume", "--resume", WRITE, ("predict",)),
    Flag("overwrite", "--overwrite", WRITE, ("predict",)),
    # generate
    option("--prompt -p", "Prompt; repeatable.", panel=INFERENCE, on=("generate",), type=list[str]),
    option("--prompts", "File of prompts: one per line, or rows with columns (CSV, JSONL, …).",
           panel=INFERENCE, on=("generate",), type=Path),
    option("--chat", "Interactive chat in the terminal; /help lists its commands.",
           panel=INFERENCE, on=("generate",), type=bool),
    Flag("context", "", INFERENCE, ("generate",)),
    option("--out -o", "JSONL file to write the answers to; must not exist.",
           panel=INFERENCE, on=("generate",), type=Path, metavar="FILE"),
    option("--adapter", "Adapter of the same base model, or name in --adapters-dir; repeatable.",
           panel=MODEL, on=("generate",), type=list[str], metavar="NAME[=DIR]"),
    Flag("adapters_dir", "", MODEL, ("generate",)),
    Flag("compare_base", "--compare-base", MODEL, ("generate",)),
    Flag("against", "", MODEL, ("generate",)),
    # evaluate, and flags shared with it
    Flag("corpus", "", DATA, ("evaluate",), metavar="FILE"),
    Flag("dataset", "", DATA, ("evaluate",)),
    Flag("split", "", DATA, ("evaluate",)),
    Flag("subset", "", DATA, ("evaluate", "predict")),
    Flag("columns", "--map", DATA, ("evaluate", "predict", "generate"),
         metavar="NAME=COLUMN"),
    Flag("ignore_columns", "", DATA, ("evaluate", "predict", "generate"), multiple=True,
         metavar="COLUMN"),
    Flag("max_eval_samples", "", DATA, ("evaluate",), FlagAliases(("--limit",))),
    Flag("base_model", "--model", MODEL,
         ("evaluate", "predict", "generate", "merge"), dest="base_model",
         aliases=FlagAliases(("--base",))),
    Flag("task", "", MODEL, ("evaluate", "predict", "generate")),
    Flag("labels", "", MODEL, ("evaluate", "predict"), multiple=True, metavar="NAME,…"),
    Flag("quant", "", MODEL, ("evaluate",)),
    Flag("dtype", "", MODEL, ("evaluate", "predict", "generate")),
    *_fields(COMPARE, ("evaluate",), "base against"),
    Flag("metrics", "", INFERENCE, ("evaluate",), multiple=True),
    Flag("max_generate_samples", "", INFERENCE, ("evaluate",)),
    *_fields(INFERENCE, ("evaluate", "predict", "generate"),
             "max_new_tokens num_beams temperature top_p"),
    Flag("resamples", "", COMPARE, ("evaluate",)),
    Flag("seed", "", INFERENCE, ("evaluate", "generate")),
    Flag("batch_size", "", INFERENCE, ("evaluate", "predict", "generate")),
    Flag("predictions", "", WRITE, ("evaluate",)),
    # merge
    Flag("output_dir", "--out -o", WRITE, ("merge",), metavar="DIR", required=True,
         aliases=FlagAliases(("--output", "--output-dir"))),
    *_fields(WRITE, ("merge",), "onto quant quant_type double_quant"),
    Flag("calibration_rows", "", WRITE, ("merge",)),
    Flag("weights", "", "Mixture", ("merge",)),
    Flag("strategy", "", "Mixture", ("merge",)),
    Flag("density", "", "Mixture", ("merge",)),
    # quantize, and flags shared with it
    *_fields(WRITE, ("quantize",), "quant quant_type"),
    Flag("double_quant", "--double-quant", WRITE, ("quantize",)),
    Flag("out", "--out -o", WRITE, ("quantize",), metavar="PATH"),
    Flag("dtype", "", WRITE, ("merge", "quantize")),
    Flag("revision", "", WRITE, ("quantize",)),
    Flag("push_to_hub", "", WRITE, ("merge", "quantize"), metavar="NAME"),
    Flag("hub_private", "", WRITE, ("merge", "quantize")),
    option("--dry-run", "Whether to only show the sizes, computed from the config.",
           panel=WRITE, on=("quantize",), type=bool),
    Flag("measure", "", COMPARE, ("quantize",)),
    Flag("verify", "", COMPARE, ("merge",)),
    Flag("rows", "", COMPARE, ("merge",)),
    *_fields(COMPARE, ("evaluate", "quantize"), "eval_text eval_tokens"),
    Flag("device", "", GENERAL,
         ("evaluate", "predict", "generate", "merge", "quantize")),
)  # fmt: skip
"""Flags of all commands but `train`, in the order of `--help`."""


_ADDED: Mapping[str, Command] = added_rows("commands")
_TAKES_RECIPES = ("train", "plan", *(n for n, own in _ADDED.items() if own.accepts))
_TRAIN_COMMANDS = ("preview", *_TAKES_RECIPES)
_EVERY = (
    *"""
    train preview plan doctor init evaluate predict generate merge quantize
    list-targets list-methods recipes runs
    """.split(),
    *_ADDED,
)
_QUIET = (
    "train",
    "merge",
    "quantize",
    *(n for n, own in _ADDED.items() if own.is_quiet),
)

_RUN_FLAGS: tuple[Flag, ...] = (
    # Arguments.
    option("[RECIPE]", "Recipe file, or config.yaml of a run.",
           on=_TAKES_RECIPES, dest="recipe_file", type=Path),
    option("[RECIPE|RUN]", "Recipe file, or run directory.",
           on=("preview",), dest="recipe_file", type=Path),
    Flag("name", "RUN|ADAPTER|MODEL", on=("evaluate", "predict"), required=True),
    Flag("name", "RUN|ADAPTER|MODEL", on=("generate",)),
    Flag("adapters", "RUN|ADAPTER...", on=("merge",), required=True, is_repeatable=True),
    Flag("model", "MODEL", on=("quantize",), required=True),
    option("ACTION", "Action: list, show, copy or convert.",
           on=("recipes",), dest="action", required=True),
    option("[FILE]", "Recipe name or path; for convert, the file of another tool.",
           on=("recipes",), dest="file", type=Path),
    option("[TO]", "Destination of copy; default: the recipe's name, in this directory.",
           on=("recipes",), dest="target", type=Path),
    option("[clean|DIR]", "Action clean, or directory of runs to list; default: runs.",
           on=("runs",), dest="action"),
    option("[DIR]", "Directory of the runs to clean; default: runs.",
           on=("runs",), dest="directory", type=Path),
    option("--yes -y", "Whether to remove checkpoints without asking.",
           panel=GENERAL, on=("runs",), type=bool),
    option("[FILE]", "Path of the new recipe; must not exist.",
           on=("init",), dest="file", type=Path, default=Path("recipe.yaml")),
    option("MODEL|FAMILY", "Directory, .gguf file, Hub id, builtin:NAME, or family such as llama.",
           on=("list-targets",), dest="model", required=True),
    # Common options of a run.
    Flag("model.name_or_path", "--model", DAILY, _ROWS),
    Flag("data.dataset", "--dataset", DAILY, _ROWS, is_repeatable=True, multiple=True,
         rest="data.also"),
    Flag("task", "--task", DAILY, _ROWS),
    Flag("method.kind", "--method", DAILY),
    Flag("quant.kind", "--quant", DAILY),
    Flag("method.r", "--lora-r", DAILY),
    Flag("train.num_train_epochs", "", DAILY, _ROWS),
    Flag("train.learning_rate", "", DAILY),
    Flag("train.per_device_train_batch_size", "", DAILY, _ROWS),
    Flag("output.dir", "--output-dir -o", DAILY),
    # Model and method.
    Flag("model.adapter", "--adapter", MODEL, metavar="RUN|ADAPTER"),
    *_fields(MODEL, _TRAIN, "model.dtype model.device model.attn_implementation"),
    *_fields(MODEL, _ROWS, "model.revision model.trust_remote_code"),
    *_fields(MODEL, _TRAIN,
             "quant.quant_type quant.double_quant method.lora_alpha method.lora_dropout"),
    Flag("method.target_modules", "", MODEL, multiple=True),
    Flag("method.target_parameters", "", MODEL, multiple=True),
    Flag("method.layers_to_transform", "", MODEL, multiple=True),
    Flag("method.bias", "", MODEL),
    Flag("method.use_dora", "--dora/--no-dora", MODEL),
    Flag("method.use_rslora", "--rslora/--no-rslora", MODEL),
    Flag("method.init_lora_weights", "--init", MODEL),
    Flag("method.modules_to_save", "", MODEL, multiple=True),
    Flag("method.trainable_token_indices", "", MODEL, multiple=True),
    Flag("method.lora_plus_ratio", "", MODEL),
    # Data.
    Flag("data.validation_file", "", DATA, _ROWS),
    Flag("data.mix", "", DATA, _ROWS, multiple=True),
    *_fields(DATA, _ROWS, "data.input_format data.subset data.split data.format"),
    Flag("data.columns", "--map", DATA, _ROWS, metavar="NAME=COLUMN"),
    Flag("data.ignore_columns", "", DATA, _ROWS, multiple=True, metavar="COLUMN"),
    Flag("data.chat_template", "", DATA, _ROWS),
    Flag("data.system", "", DATA, _ROWS, metavar="TEXT"),
    *_fields(DATA, _ROWS,
             "data.train_on_inputs data.max_length data.max_target_length data.overlong "
             "data.doc_stride data.mlm_probability data.problem_type data.source_language "
             "data.target_language data.validation_split data.max_samples data.max_eval_samples "
             "data.cache data.num_proc data.on_bad_row"),
    # Training.
    Flag("train.max_steps", "", HOW, _ROWS),
    *_fields(HOW, _TRAIN, "train.head_learning_rate train.lr_scheduler_type"),
    Flag("train.lr_scheduler_kwargs", "", HOW, metavar="NAME=VALUE",
         aliases=FlagAliases(convert=partial(convert_pairs, "--lr-scheduler-kwargs"))),
    *_fields(HOW, _TRAIN, "train.warmup_steps train.optim"),
    Flag("train.optim_args", "", HOW, metavar="NAME=VALUE",
         aliases=FlagAliases(convert=partial(convert_pairs, "--optim-args"))),
    *_fields(HOW, _TRAIN,
             "train.weight_decay train.adam_beta1 train.adam_beta2 train.adam_epsilon "
             "train.max_grad_norm train.on_nonfinite train.spike_factor "
             "train.label_smoothing_factor"),
    Flag("train.class_weights", "", HOW, metavar="balanced|NAME=W,…"),
    *_fields(HOW, _TRAIN,
             "train.focal_gamma train.neftune_noise_alpha distillation.teacher "
             "distillation.divergence distillation.kd_ratio distillation.kd_temperature "
             "distillation.kd_top_k"),
    Flag("train.gradient_accumulation_steps", "", HOW, _ROWS),
    *_fields(HOW, _TRAIN,
             "train.per_device_eval_batch_size train.train_sampling_strategy train.num_processes "
             "train.shard train.max_restarts"),
    Flag("train.gradient_checkpointing", "", HOW, aliases=FlagAliases(values={"auto": "auto"})),
    *_fields(HOW, _TRAIN, "train.offload_activations train.tf32 speed.fast"),
    Flag("speed.tokens_per_micro_batch", "", HOW, metavar="N|auto"),
    Flag("speed.liger_kernel", "--liger-kernel/--no-liger-kernel", HOW),
    Flag("speed.verify", "--verify-fast/--no-verify-fast", HOW),
    Flag("train.seed", "", HOW),
    *_fields(HOW, _TRAIN,
             "train.data_seed train.logging_steps train.eval_strategy train.eval_steps "
             "train.eval_on_start train.load_best_model_at_end train.metric_for_best_model "
             "train.greater_is_better train.early_stopping_patience "
             "train.early_stopping_threshold"),
    Flag("train.metrics", "", HOW, multiple=True),
    Flag("train.predict_with_generate", "", HOW),
    Flag("train.max_new_tokens", "", HOW),
    Flag("train.num_beams", "", HOW),
    Flag("train.temperature", "", HOW),
    Flag("train.top_p", "", HOW),
    # Run.
    option("--recipe", "Recipe file; flags override it.", panel=RUN, on=_TRAIN_COMMANDS, type=Path),
    option("--set", "Value of any configuration field; repeatable.",
           panel=RUN, on=(*_TRAIN_COMMANDS, "init"), type=list[str], metavar="KEY=VALUE",
           dest="settings"),
    *_fields(RUN, _TRAIN,
             "train.save_strategy train.save_steps train.save_minutes train.save_total_limit "
             "output.overwrite output.resume"),
    Flag("output.allow_change", "", RUN, is_repeatable=True, multiple=True, metavar="FIELD"),
    Flag("output.run_name", "", RUN),
    Flag("output.report_to", "", RUN, multiple=True),
    Flag("output.tracker_project", "", RUN),
    Flag("output.push_to_hub", "", RUN, metavar="NAME"),
    Flag("output.hub_private", "", RUN),
    option("--log-file", "File to which the output of the run is also appended.",
           panel=RUN, type=Path, metavar="FILE"),
    option("--dry-run", "Whether to only resolve and check the configuration.",
           panel=RUN, type=bool),
)  # fmt: skip

_GENERAL_FLAGS: tuple[Flag, ...] = (
    # list-targets and list-methods
    option("--lora-r", "LoRA rank for the parameter counts.",
           panel=GENERAL, on=("list-targets",), type=int, default=8, minimum=1),
    option("--model", "Model or family to filter by.",
           panel=GENERAL, on=("list-methods",), metavar="MODEL|FAMILY"),
    option("--task", "Task to filter by.", panel=GENERAL, on=("list-methods",)),
    option("--quant", "Quantization to filter by: none, 4bit or 8bit.",
           panel=GENERAL, on=("list-methods",)),
    # Output and verbosity.
    option("--json", "Whether to print a single JSON object and nothing else.",
           panel=GENERAL, on=_EVERY, type=bool, dest="as_json"),
    option("--quiet -q", "Whether to print errors only.", panel=GENERAL, on=_QUIET, type=bool),
    option("--quiet -q", "Whether to print metrics only.",
           panel=GENERAL, on=("evaluate",), type=bool),
    option("--help-all", "Show all options.", panel=GENERAL, on=(*_TRAIN_COMMANDS, "init"),
           type=bool),
    option("--quiet -q", "Whether to print warnings and errors only.",
           panel=GENERAL, on=("predict",), type=bool),
    option("--schema", "Whether to print the JSON schema of recipes.", panel=GENERAL, type=bool),
    option("--traceback", "Whether to show the traceback of an error.",
           panel=GENERAL, on=_EVERY, type=bool),
)  # fmt: skip


def _merge_rows(rows: Iterable[Flag]) -> list[Flag]:
    """Returns the rows; those of task sections with one name, such as `--loss`, are one flag.

    It sets the first row's field, or that of the section that the task uses.
    """
    merged: list[Flag] = []
    shared: dict[str, dict[str, str]] = {}  # name → task → field
    for row in rows:
        section = SECTIONS.get(row.path.partition(".")[0])
        if section is not None and row.name in shared:
            shared[row.name] |= dict.fromkeys(section.tasks, row.path)
            continue
        if section is not None:
            shared[row.name] = dict(row.by_task)
        merged.append(row)
    return [replace(row, by_task=shared.get(row.name, row.by_task)) for row in merged]


def _extended() -> Iterator[Flag]:
    """Yields all flags; raises ConfigError if two packages define the same flag of a command."""
    own: list[Flag] = []
    flags: list[tuple[str, Sequence[Flag]]] = [(OWN, own)]
    aliases: dict[str, list[FlagAliases]] = {}
    for source, extension in find_extensions():
        try:
            rows = extension.flags()
            if source == OWN:
                own += rows
            else:
                flags.append((source, rows))
            for path, more in extension.aliases().items():
                aliases.setdefault(path, []).append(more)
        except Exception as error:
            if source == OWN:
                raise
            warn_skipped(source, error)
    own[:] = _merge_rows(own)
    names: dict[tuple[str, str], str] = {}
    for source, rows in ((OWN, (*_RUN_FLAGS, *COMMAND_FLAGS)), *flags, (OWN, _GENERAL_FLAGS)):
        for row in rows:
            is_invalid = isinstance(row, UnsupportedFlag)
            for key in () if is_invalid else ((command, row.name) for command in row.on):
                if (other := names.setdefault(key, source)) != source:
                    raise ConfigError(
                        f"{key[1]} of ftlevel {key[0]} is defined by {other} and by {source}. "
                        "Uninstall one of them."
                    )
            for more in aliases.get(row.path, ()) if "train" in row.on else ():
                row = replace(
                    row, aliases=row.aliases | more, by_task={**row.by_task, **more.by_task}
                )
            yield row


FLAGS: tuple[Flag, ...] = tuple(_extended())
"""Flags of all commands, in the order of `--help`."""


def _is_of_the_run(path: str) -> bool:
    return not path.startswith("output.")


_ACCEPTS: dict[str, Callable[[str], bool]] = {
    "plan": _is_of_the_run,
    "init": _is_of_the_run,
    **{name: own.accepts for name, own in _ADDED.items() if own.accepts},
}
"""Command → function that returns whether it accepts train's flag of a (dotted) field."""


def flags_of(command: str, flags: Sequence[Flag] = FLAGS) -> list[Flag]:
    """Returns the flags of `command`."""
    accepts = _ACCEPTS.get(command)
    return [
        flag
        for flag in flags
        if not isinstance(flag, UnsupportedFlag)
        and (
            command in flag.on
            or (accepts and "train" in flag.on and flag.path and accepts(flag.path))
        )
    ]


def _find_flag(path: str, config: type[BaseModel] | None) -> str:
    command = command_of(config) if config else "train"
    for flag in FLAGS:
        paths = (flag.path, flag.rest, *flag.by_task.values())
        if command in flag.on and any(path in (full, full.partition(".")[2]) for full in paths):
            return flag.name
    return path


Constraint.find_flag = staticmethod(_find_flag)


def recipe_hint(name: str, command: str = "train") -> str:
    """Returns a hint for a recipe key `name` that is a flag of `command`, else "".

    For `load_in_4bit`, the hint is the key to write instead: `quant.kind: 4bit`.
    """
    flag_name = "--" + name.lower().replace("_", "-")
    for flag in FLAGS:
        if command not in flag.on or flag.is_argument:
            continue
        values = {
            part: "" for given in flag.typer_names(is_switch=False) for part in given.split("/")
        }
        values |= {other.name: other.value or "" for other in flag.alias_names}
        if flag_name not in values:
            continue
        if not flag.path:
            return f" It is a flag of the command line, not a key: {flag_name}."
        value = f": {values[flag_name]}" if values[flag_name] else ""
        return f" Did you mean {flag.path + value!r}?"
    return ""
