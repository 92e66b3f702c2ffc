"""The table of flags: one row a flag, from which signatures, help, second names and docs are made.

Data only; `cli/flags.py` makes Typer's options of it and `scripts/write_docs.py` docs/cli.md. A
flag that sets a field takes its help, its choices, its default and its type from the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.config.commands.evaluate import EvaluateConfig
from ftlevel.config.commands.export import ExportConfig
from ftlevel.config.commands.generate import GenerateConfig
from ftlevel.config.commands.merge import MergeConfig
from ftlevel.config.commands.predict import PredictConfig
from ftlevel.config.commands.quantize import QuantizeConfig
from ftlevel.config.field_facts import FieldFacts, describe_field
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig

CONFIGS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "preview": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
}
"""Command → the configuration that its flags set."""


@dataclass(frozen=True)
class Spelling:
    """What another tool calls a flag, where its values are not ours.

    Attributes:
        name: as it is typed, with dashes; underscores are read as dashes everywhere.
        value: the spelling is a switch, and giving it sets the flag to this.
        values: their word for a value → ours; other values are passed on as they are.
    """

    name: str
    value: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Flag:
    """One flag or argument of one or several commands.

    Attributes:
        path: dotted path of the field that it sets, from the configuration of the command;
            `method.NAME` may be a field of any method. Empty: the command itself reads it.
        names: as Typer declares it, spaces between; an argument is its metavar. The default is
            the field's name, with `--no-…` for a switch.
        panel: heading under which `--help` and docs/cli.md show it.
        on: the commands that have it.
        also: other tools' names for it, which hold for every command that has the flag.
        metavar: what stands for its value in help; the default is by the type.
        required: the command line is refused without it.
        rest: path of the field that takes what is given beyond the first value.
        example: of a NAME=VALUE pair, for the error about one that is none.
        noun: what it sets, for the error about two spellings that are given together.
        dest: name of the parameter; the default is the flag's.
        help, type, default, minimum: of a flag that sets no field.
        answer: there is no such flag; whoever gives it is told this instead.
    """

    path: str = ""
    names: str = ""
    panel: str = ""
    on: Sequence[str] = ("train",)
    also: Sequence[str | Spelling] = ()
    metavar: str | None = None
    required: bool = False
    rest: str = ""
    example: str = ""
    noun: str = ""
    dest: str = ""
    help: str = ""
    type: Any = str
    default: Any = None
    minimum: int | None = None
    answer: str = ""

    @property
    def spellings(self) -> list[Spelling]:
        """The second names."""
        return [Spelling(name) if isinstance(name, str) else name for name in self.also]

    @property
    def is_argument(self) -> bool:
        """Whether it stands without a name on the command line."""
        return bool(self.names) and not self.names.startswith("-")

    @property
    def shown(self) -> str:
        """What errors call it."""
        if self.is_argument:
            return self.names
        return self.names.split()[0].partition("/")[0] if self.names else _flag_of(self.path)

    @property
    def parameter(self) -> str:
        """The name under which a command reads it."""
        if self.dest or not self.is_argument:
            return self.dest or self.shown.lstrip("-").replace("-", "_")
        return self.path.replace(".", "_")

    def facts(self, command: str) -> FieldFacts | None:
        """Return what the field that it sets says of itself, if it sets one."""
        return describe_field(CONFIGS[command], self.path) if self.path else None

    def declared(self, is_switch: bool) -> list[str]:
        """Return the names as Typer takes them."""
        if self.names:
            return self.names.split()
        name = _flag_of(self.path)
        return [f"{name}/--no-{name[2:]}" if is_switch else name]


def _flag_of(path: str) -> str:
    return "--" + path.rpartition(".")[2].replace("_", "-")


DAILY, MODEL, DATA = "Daily", "Model and method", "Data"
HOW, RUN, GENERAL = "Optimisation", "Run", "General"
COMPARE, ANSWER, WRITE = "Comparison", "Answers", "Result"

_ROWS = ("train", "preview")
_EVERY = ("train", "preview", "evaluate", "predict", "generate", "merge", "quantize",
          "export", "list-targets", "list-methods")  # fmt: skip
_QUIET = ("train", "merge", "quantize", "export")
_TRACED = tuple(name for name in _EVERY if name != "preview")

FLAGS: tuple[Flag, ...] = (
    # Arguments.
    Flag(names="[RECIPE]", dest="recipe_file", type=Path,
         help="A recipe, or the config.yaml of a run."),
    Flag(names="[RECIPE|RUN]", on=("preview",), dest="recipe_file", type=Path,
         help="A recipe, or the directory of a run."),
    Flag("name", "RUN|ADAPTER|MODEL", on=("evaluate", "predict"), required=True),
    Flag("name", "RUN|ADAPTER|MODEL", on=("generate",)),
    Flag("adapters", "RUN|ADAPTER...", on=("merge",), required=True, type=list[str]),
    Flag("model", "MODEL", on=("quantize",), required=True),
    Flag("model", "RUN|MODEL", on=("export",), required=True),
    Flag(names="MODEL|FAMILY", on=("list-targets",), dest="model", required=True,
         help="A directory, a .gguf file, a Hub id, builtin:NAME, or a family such as llama."),
    # The ten that nearly every run has.
    Flag("model.name_or_path", "--model", DAILY, _ROWS, also=("--model-name-or-path",)),
    Flag("data.dataset", "--dataset", DAILY, _ROWS, also=("--dataset-name",), type=list[str],
         rest="data.also"),
    Flag("task", "--task", DAILY, _ROWS, also=("--task-type",)),
    Flag("method.kind", "--method", DAILY, also=("--peft-method",)),
    Flag("quant.kind", "--quant", DAILY, also=("--quantization-type",)),
    Flag("method.r", "--lora-r", DAILY, also=("--lora-rank", "--rank")),
    Flag("train.num_train_epochs", "", DAILY, _ROWS, also=("--epochs",)),
    Flag("train.learning_rate", "", DAILY, also=("--lr",)),
    Flag("train.per_device_train_batch_size", "", DAILY, _ROWS,
         also=("--train-batch-size", "--batch-size")),
    Flag("output.dir", "--output-dir", DAILY),
    # What is trained.
    Flag("model.dtype", "", MODEL, also=("--torch-dtype", Spelling("--bf16", value="bfloat16"),
         Spelling("--fp16", value="float16")), noun="the precision"),
    Flag("model.device", "", MODEL),
    Flag("quant.quant_type", "", MODEL, also=("--bnb-4bit-quant-type",)),
    Flag("quant.double_quant", "", MODEL,
         also=("--bnb-4bit-use-double-quant", "--use-double-quant")),
    Flag("method.lora_alpha", "", MODEL),
    Flag("method.lora_dropout", "", MODEL),
    Flag("method.target_modules", "", MODEL, also=("--lora-target-modules",)),
    Flag("method.use_dora", "--dora/--no-dora", MODEL, also=("--use-dora",)),
    Flag("method.use_rslora", "--rslora/--no-rslora", MODEL, also=("--use-rslora",)),
    Flag("method.init_lora_weights", "--init", MODEL, also=("--init-lora-weights",)),
    Flag("method.lora_plus_ratio", "", MODEL, also=("--loraplus-lr-ratio",)),
    # Its data.
    Flag("data.mix", "", DATA, _ROWS),
    Flag("data.split", "", DATA, _ROWS),
    Flag("data.format", "", DATA, _ROWS),
    Flag("data.columns", "--map", DATA, _ROWS, metavar="NAME=COLUMN", example="summary=abstract"),
    Flag("data.chat_template", "", DATA, _ROWS),
    Flag("data.max_length", "", DATA, _ROWS, also=("--max-seq-length", "--model-max-length")),
    Flag("data.overlong", "", DATA, _ROWS),
    Flag("data.validation_split", "", DATA, _ROWS),
    Flag("data.max_samples", "", DATA, _ROWS, also=("--max-train-samples",)),
    Flag("data.streaming", "", DATA, _ROWS),
    Flag("data.cache", "", DATA, _ROWS),
    Flag("data.on_bad_row", "", DATA, _ROWS),
    # How it is trained.
    Flag("train.max_steps", "", HOW, _ROWS),
    Flag("train.lr_scheduler_type", "", HOW),
    Flag("train.warmup_steps", "", HOW),
    Flag("train.gradient_accumulation_steps", "", HOW, _ROWS),
    Flag("train.num_processes", "", HOW),
    Flag("train.gradient_checkpointing", "", HOW),
    Flag("speed.fast", "", HOW),
    Flag("speed.verify", "--verify-fast/--no-verify-fast", HOW),
    Flag("train.seed", "", HOW),
    Flag("train.logging_steps", "", HOW),
    Flag("train.eval_steps", "", HOW),
    Flag("train.eval_on_start", "", HOW),
    # The run.
    Flag(names="--recipe", panel=RUN, on=_ROWS, type=Path, help="A recipe; flags win over it."),
    Flag(names="--set", panel=RUN, on=_ROWS, type=list[str], metavar="KEY=VALUE", dest="settings",
         help="Set any field; repeatable."),
    Flag("train.save_steps", "", RUN),
    Flag("output.overwrite", "", RUN, also=("--overwrite-output-dir",)),
    Flag("output.resume", "", RUN, also=("--resume-from-checkpoint",)),
    Flag("output.report_to", "", RUN),
    Flag(names="--dry-run", panel=RUN, type=bool,
         help="Resolve, check and show; train nothing."),
    # preview
    Flag(names="--row", panel=WRITE, on=("preview",), type=list[int], metavar="N", minimum=1,
         help="Show row N, from 1; repeatable."),
    Flag(names="--html", panel=WRITE, on=("preview",), type=Path, metavar="FILE",
         help="Write one page that needs nothing else."),
    # predict
    Flag("dataset", "--dataset", DATA, ("predict",), metavar="FILE|-", required=True),
    Flag("input_format", "", DATA, ("predict",)),
    Flag("format", "", DATA, ("predict",)),
    Flag("limit", "", DATA, ("predict",)),
    Flag("on_bad_row", "", DATA, ("predict",)),
    Flag("overlong", "", DATA, ("predict",)),
    Flag("output", "--output -o", WRITE, ("predict",), metavar="FILE"),
    Flag("column", "", WRITE, ("predict",)),
    Flag("probabilities", "--probabilities", WRITE, ("predict",)),
    Flag("top_k", "", WRITE, ("predict",)),
    Flag("resume", "--resume", WRITE, ("predict",)),
    Flag("overwrite", "--overwrite", WRITE, ("predict",)),
    # generate
    Flag(names="--prompt -p", panel=ANSWER, on=("generate",), type=list[str],
         help="What to say; repeatable."),
    Flag(names="--prompts", panel=ANSWER, on=("generate",), type=Path,
         help="File of prompts: a text with one a line, or rows, by their columns: CSV, JSONL, …"),
    Flag(names="--chat", panel=ANSWER, on=("generate",), type=bool,
         help="Talk in the terminal; /help shows its commands."),
    Flag("context", "", ANSWER, ("generate",)),
    Flag(names="--out", panel=ANSWER, on=("generate",), type=Path,
         help="Write the answers to this JSONL file; must not exist."),
    Flag(names="--adapter", panel=MODEL, on=("generate",), type=list[str], metavar="NAME[=DIR]",
         help="An adapter of the same base, or one of --adapters-dir; repeatable."),
    Flag("adapters_dir", "", MODEL, ("generate",)),
    Flag("compare_base", "--compare-base", MODEL, ("generate",)),
    Flag("temperature", "", ANSWER, ("generate",)),
    Flag("top_p", "", ANSWER, ("generate",)),
    # evaluate, and what it shares
    Flag("dataset", "", DATA, ("evaluate",)),
    Flag("split", "", DATA, ("evaluate",)),
    Flag("subset", "", DATA, ("evaluate",)),
    Flag("columns", "--map", DATA, ("evaluate", "predict", "generate"), metavar="NAME=COLUMN",
         example="summary=abstract"),
    Flag("max_eval_samples", "", DATA, ("evaluate",)),
    Flag("task", "", MODEL, ("evaluate", "predict", "generate")),
    Flag("quant", "", MODEL, ("evaluate",)),
    Flag("base", "", COMPARE, ("evaluate",)),
    Flag("against", "", COMPARE, ("evaluate",)),
    Flag("max_generate_samples", "", ANSWER, ("evaluate",)),
    Flag("max_new_tokens", "", ANSWER, ("evaluate", "predict", "generate")),
    Flag("resamples", "", COMPARE, ("evaluate",)),
    Flag("seed", "", ANSWER, ("evaluate", "generate")),
    Flag("batch_size", "", ANSWER, ("evaluate", "predict", "generate")),
    Flag("predictions", "", WRITE, ("evaluate",)),
    # merge
    Flag("output_dir", "--out", WRITE, ("merge",), metavar="DIR", required=True),
    Flag("onto", "", WRITE, ("merge",)),
    Flag("base", "", WRITE, ("merge",)),
    Flag("weights", "", "Mixture", ("merge",)),
    Flag("strategy", "", "Mixture", ("merge",)),
    Flag("density", "", "Mixture", ("merge",)),
    # quantize and export, and what they share
    Flag("quant", "", WRITE, ("quantize",)),
    Flag("quant_type", "", WRITE, ("quantize",)),
    Flag("double_quant", "--double-quant", WRITE, ("quantize",)),
    Flag("format", "", WRITE, ("export",)),
    Flag("outtype", "", WRITE, ("export",)),
    Flag("out", "--out -o", WRITE, ("quantize", "export")),
    Flag("overwrite", "--overwrite", WRITE, ("export",)),
    Flag("dtype", "", WRITE, ("merge", "quantize")),
    Flag("revision", "", WRITE, ("quantize", "export")),
    Flag(names="--dry-run", panel=WRITE, on=("quantize",), type=bool,
         help="Show the sizes from the config alone; write nothing."),
    Flag(names="--dry-run", panel=WRITE, on=("export",), type=bool,
         help="Check and show everything; write nothing."),
    Flag("measure", "", COMPARE, ("quantize",)),
    Flag("verify", "", COMPARE, ("merge", "export")),
    Flag("rows", "", COMPARE, ("merge",)),
    Flag("verify_tokens", "", COMPARE, ("export",)),
    Flag("eval_text", "", COMPARE, ("evaluate", "quantize")),
    Flag("eval_tokens", "", COMPARE, ("evaluate", "quantize")),
    Flag("device", "", GENERAL, ("evaluate", "predict", "generate", "merge", "quantize", "export")),
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
    Flag(names="--quiet -q", panel=GENERAL, on=("predict",), type=bool,
         help="Print warnings and errors only."),
    Flag(names="--schema", panel=GENERAL, type=bool, help="Print the JSON schema of recipes."),
    Flag(names="--traceback", panel=GENERAL, on=_TRACED, type=bool,
         help="Show where an error arose."),
)  # fmt: skip


def flags_of(command: str, flags: Sequence[Flag] = FLAGS) -> list[Flag]:
    """Return the flags that `command` has."""
    return [flag for flag in flags if command in flag.on and not flag.answer]


def second_names(flags: Sequence[Flag] = FLAGS) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Return second name → (the flag's own, their word for a value → ours)."""
    return {
        other.name: (flag.shown, other.values)
        for flag in flags
        for other in flag.spellings
        if other.value is None
    }
