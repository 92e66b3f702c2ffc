"""Configuration of a training run, and checks across its sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator

from ftlevel.config.constraints import Excludes, Needs, NoEffect, flag_name, list_violations
from ftlevel.config.methods import SPECS, LoraSpec, MethodConfig
from ftlevel.config.output import OutputConfig
from ftlevel.config.reading import resolve_aliases
from ftlevel.config.section import TEXT_FIELDS, TaskSection
from ftlevel.config.sections import (
    DataConfig,
    DistillationConfig,
    ModelConfig,
    QuantConfig,
    Section,
    SpeedConfig,
    list_distillation_rules,
)
from ftlevel.config.tasks import TASKS, TaskName
from ftlevel.config.trainer import TrainerConfig, validate_optimizer
from ftlevel.errors import excludes, has_no_effect, join_names, with_article
from ftlevel.extensions import loaded

T = TypeVar("T", bound=TaskSection)

_ADDED: dict[str, type[TaskSection]] = loaded("sections")
SECTIONS: dict[str, type[TaskSection]] = {
    **_ADDED,
}
"""Sections of some tasks; those of extensions are added to the fields of `TrainConfig`."""

SHORTHAND = {
    "model": "name_or_path",
    "method": "kind",
    "quant": "kind",
    "data": "dataset",
    "distillation": "teacher",
    "output": "dir",
    **{name: section.shorthand for name, section in SECTIONS.items() if section.shorthand},
}
"""Field set by a plain value of a section: `method: lora` means `method: {kind: lora}`."""


def expand_shorthand(section: str, value: Any) -> Any:
    """Returns a plain value as a mapping, such as `{kind: lora}` for `lora`; others unchanged."""
    if section not in SHORTHAND or type(value) is dict or isinstance(value, BaseModel):
        return value
    return {SHORTHAND[section]: value}


class TrainConfig(Section):
    """Configuration of a run; the same configuration gives the same adapter."""

    task: TaskName = Field("text-generation", description="Task to train the model for.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="Pretrained model.")
    quant: QuantConfig = Field(default_factory=QuantConfig, description="Quantization of the base.")
    method: MethodConfig = Field(default_factory=LoraSpec, description="Fine-tuning method.")
    data: DataConfig = Field(default_factory=DataConfig, description="Datasets and their columns.")
    train: TrainerConfig = Field(
        default_factory=TrainerConfig, description="Optimizer and schedule."
    )
    distillation: DistillationConfig = Field(
        default_factory=DistillationConfig, description="Distillation from a teacher model."
    )
    speed: SpeedConfig = Field(default_factory=SpeedConfig, description="Fast training step.")
    output: OutputConfig = Field(
        default_factory=OutputConfig, description="Run directory, trackers and Hub upload."
    )

    @property
    def task_options(self) -> dict[str, Any]:
        """Settings that the task needs, by name: the arguments of `BaseTask.configured`."""
        options = {name: getattr(self, name).get_options(self) for name in SECTIONS}
        return {"teacher": self.distillation.teacher, **options}

    @property
    def task_section(self) -> TaskSection:
        """Section of the configured task; one without effect for tasks that have none."""
        names = (name for name, own in SECTIONS.items() if self.task in own.tasks)
        return next((getattr(self, name) for name in names), TaskSection())

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of generated tokens."""
        return self.task_section.max_new_tokens or self.train.max_new_tokens

    def get_section(self, section: type[T]) -> T:
        """Returns the section of the class `section`, which an extension added."""
        return next(own for n in _ADDED if isinstance(own := getattr(self, n), section))

    def list_unused(self, kind: str) -> Iterator[str]:
        """Yields a message per non-default setting that task and model `kind` do not use."""
        if not TASKS[self.task].startswith("ftlevel."):
            return
        for path, core_owners in _OWNERS.items():
            owners = (*core_owners, *_list_added_tasks(path))
            section, _, name = path.partition(".")
            values: BaseModel = getattr(self, section)
            default = type(values).model_fields[name].default
            if getattr(values, name) != default and not {self.task, kind}.intersection(owners):
                current = f"--task {self.task} and {with_article(kind)}"
                yield has_no_effect(path, current, f"it is for {join_names(owners)}")

    def with_sections(self, **sections: Any) -> TrainConfig:
        """Returns a validated copy with `sections` replaced; raises ConfigError if invalid."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return TrainConfig(**{**values, **sections})

    @model_validator(mode="before")
    @classmethod
    def _default_quantization(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("method"), dict):
            return raw
        quant, spec = raw.get("quant") or {}, SPECS.get(str(raw["method"].get("kind")))
        if (
            spec
            and spec.default_quant != "none"
            and isinstance(quant, dict)
            and "kind" not in quant
        ):
            return {**raw, "quant": {**quant, "kind": spec.default_quant}}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _resolve_aliases(cls, raw: Any) -> Any:
        """Resolve shorthands and aliases; a method without `kind` is LoRA."""
        if not isinstance(raw, dict):
            return raw
        sections = {key: expand_shorthand(key, value) for key, value in raw.items()}
        for name in _ADDED:  # their loss depends on the task, or determines it
            if isinstance(section := sections.get(name), Section):
                sections[name] = {n: getattr(section, n) for n in section.model_fields_set}
        values, _ = resolve_aliases(sections)
        if isinstance(values.get("method"), dict):
            values["method"] = {"kind": "lora", **values["method"]}
        for own in _ADDED.values():
            values = own.complete_run(values)
        return values

    def list_conflicts(self) -> Iterator[str]:
        """Yields an error message per conflict between sections."""
        yield from _validate_sections(self)


_GENERATION_TASKS = ("text-generation", "summarization", "translation")
_OWNERS: dict[str, tuple[str, ...]] = {
    **{path: _GENERATION_TASKS for path in TEXT_FIELDS if path.startswith("train.")},
    "data.doc_stride": ("question-answering",),
    "data.mlm_probability": ("masked-lm",),
    "data.labels": ("text-classification", "token-classification"),
    "data.max_target_length": ("encoder-decoder",),
}
"""Dotted field → tasks, or kinds of models, that use it."""


def _list_added_tasks(path: str) -> list[str]:
    """Returns the tasks of extensions that use the dotted field `path` of another section."""
    return [task for own in SECTIONS.values() for task, paths in own.uses.items() if path in paths]


_OVERLONG: dict[str, tuple[str, ...]] = {
    "text-generation": ("drop", "truncate-prompt", "split"),
    "masked-lm": ("drop", "split"),
    **dict.fromkeys(("token-classification", "question-answering"), ("drop",)),
    **{task: own.overlong for own in SECTIONS.values() if own.overlong for task in own.tasks},
}
"""Task → values of `--overlong`, besides error; default: drop and truncate-prompt."""
_RESUME_RUN = ("output.dir RUN", "it is the run to resume")
_BEST = (
    "train.eval_strategy=no",
    "it needs evaluations during training",
    "Use --eval-strategy epoch or steps.",
)
_TWO_SETS = "both define the validation rows"
CONSTRAINTS = (
    Needs("quant.double_quant", "quant.kind=4bit"),
    Needs("quant.quant_type=fp4", "quant.kind=4bit"),
    Excludes("model.dtype=float16", "model.device=cpu",
         "the CPU computes it in software, and it overflows in training",
         "Use --dtype bfloat16 or float32."),
    Excludes("output.resume", "output.overwrite",
         "one keeps the run and the other replaces it"),
    Needs("output.resume", *_RESUME_RUN),
    Needs("train.max_restarts", "train.num_processes!=None|1 N",
         fix="To continue a single process, use --resume."),
    Needs("train.max_restarts", *_RESUME_RUN),
    Excludes("train.on_nonfinite=rollback", "train.save_strategy=no",
         "it goes back to a checkpoint, and none is written",
         "Use --save-steps N, or --on-nonfinite skip."),
    Excludes("train.focal_gamma", "train.label_smoothing_factor"),
    NoEffect("train.eval_steps", "train.eval_strategy=no|epoch|best",
         fix="Drop one of them."),
    NoEffect("train.save_steps", "train.save_strategy=no|epoch|best",
         fix="Drop one of them."),
    NoEffect("output.run_name", "output.dir", "no tracker shows it",
         when="output.report_to=()"),
    Needs("output.tracker_project", "output.report_to wandb", "it is the tracker's"),
    Excludes("data.validation_file", "data.validation_split!=None|0.0", _TWO_SETS),
    *[
        NoEffect(path, f"task!={'|'.join(tasks)}", f"it is for --task {join_names(tasks)}")
        for path in ("data.qrels", "data.corpus")
        if (tasks := _list_added_tasks(path))
    ],
    Excludes("data.qrels", "data.validation_file", _TWO_SETS),
    Excludes("data.qrels", "data.validation_split!=None|0.0", _TWO_SETS),
    Excludes("train.early_stopping_patience", *_BEST),
    Excludes("train.load_best_model_at_end=True", *_BEST),
    Excludes("train.save_strategy=best", *_BEST),
    Needs("train.early_stopping_threshold", "train.early_stopping_patience N"),
    *[
        NoEffect(f"train.{name}", "train.load_best_model_at_end=False",
             fix="Drop one of them.",
             when="train.early_stopping_patience=None & train.save_strategy!=best")
        for name in ("metric_for_best_model", "greater_is_better")
    ],
    # tasks
    *[
        NoEffect(path, f"task!={'|'.join((*_GENERATION_TASKS, *_list_added_tasks(path)))}",
             "it is for tasks that write text", "Drop it, or change the task.")
        for path in ("data.system", "data.train_on_inputs")
    ],
    Excludes("data.overlong=truncate-prompt", "data.train_on_inputs",
         "one cuts prompts and the other supervises them",
         "Use --overlong drop, or drop one of them."),
    *[
        NoEffect(f"data.{name}", f"task!={task}", f"it is for --task {task}",
             "Drop it, or change the task.")
        for name, task in (
            ("problem_type", "text-classification"),
            ("source_language", "translation"),
            ("target_language", "translation"),
        )
    ],
    *list_distillation_rules(
        [task for own in _ADDED.values() if own.has_teacher for task in own.tasks]
    ),
)  # fmt: skip
"""Rules of every task; those of one kind of task are in the module of its section."""


def _validate_sections(config: TrainConfig) -> Iterator[str]:
    yield from config.method.validate_quant(config.quant)
    yield from list_violations(config, CONSTRAINTS)
    yield from validate_optimizer(config.train)
    yield from _validate_task_sections(config)
    data = config.data
    sets, mix = 1 + len(data.also), data.mix
    if mix is not None and len(mix) != sets:
        yield (
            f"--mix has {len(mix)} share{'s' * (len(mix) != 1)} for {sets} data "
            f"set{'s' * (sets != 1)}. Give one share for each --dataset."
        )
    allowed = _OVERLONG.get(config.task, ("drop", "truncate-prompt"))
    if data.overlong not in ("error", *allowed):
        fix, task = f"Use --overlong {' or '.join(allowed)}", f"--task {config.task}"
        if "task" not in config.model_fields_set:  # it may be inferred later
            fix, task = f"{fix}, or name the task", f"{task}, the default"
        yield excludes(f"--overlong {data.overlong}", task, fix=f"{fix}.")
    yield from _validate_stdin(config)


def _validate_task_sections(config: TrainConfig) -> Iterator[str]:
    for name, section in SECTIONS.items():
        own = getattr(config, name)
        if config.task in section.tasks:
            yield from own.validate_run(config)
            continue
        for field in own.changed:
            reason, fix = f"it is for --task {name}", "Drop it, or change the task."
            yield has_no_effect(flag_name(f"{name}.{field}"), f"--task {config.task}", reason, fix)


def _validate_stdin(config: TrainConfig) -> Iterator[str]:
    data, is_single = config.data, (config.train.num_processes or 1) == 1
    names = (data.dataset, *data.also)
    if data.validation_file == "-":
        yield "--validation-file -: stdin is for --dataset. Name a file."
    if "-" in names and config.output.resume:
        reason = "the rows came through a pipe and are no longer available"
        yield excludes("--resume", "--dataset -", reason, "Save them to a file and train on that.")
    for name in (*names, data.validation_file or ""):
        if not is_single and (name == "-" or Path(name).is_fifo()):
            reason, fix = "only one process can read a pipe", "Save the rows to a file."
            yield excludes("--num-processes", f"--dataset {name}", reason, fix)


# Files may be a stranger's: some settings only the command line or Python code may make.
COMMAND_LINE_ONLY = {
    "model.trust_remote_code": ("--trust-remote-code", "runs Python code that ships with a model"),
    "output.overwrite": ("--overwrite", "deletes an existing run"),
    "output.push_to_hub": ("--push-to-hub {}", "uploads the trained model"),
    **{
        f"{name}.{field}": row
        for name, section in SECTIONS.items()
        for field, row in section.command_line_only.items()
    },
}
"""Dotted field → (flag, what it does); a file cannot set it."""


def check_values(values: Mapping[str, Any], locations: Mapping[str, str]) -> Iterator[str]:
    """Yields a message for each value of a file that only the command line may set.

    `locations` has the dotted fields that a file set → file:line; `values` is the configuration.
    """
    for field, (flag, effect) in COMMAND_LINE_ONLY.items():
        section, _, name = field.partition(".")
        value = (values.get(section) or {}).get(name)
        if field in locations and value not in (None, False):
            yield (
                f"{locations[field]}: {field} is {value!r}, which {effect}; a file cannot decide "
                f"this. If you want it, pass {flag.format(value)}; otherwise delete the line."
            )


def pop_command_line_only(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Remove the fields that a file cannot set from `values`; yields (dotted field, flag)."""
    for field, (flag, _) in COMMAND_LINE_ONLY.items():
        section, _, name = field.partition(".")
        value = values.get(section, {}).pop(name, None)
        if value not in (None, False):
            yield field, flag.format(value)


if not TYPE_CHECKING and _ADDED:
    TrainConfig = create_model(
        "TrainConfig",
        __base__=TrainConfig,
        __module__=__name__,
        __doc__=TrainConfig.__doc__,
        **{
            name: (section, Field(default_factory=section, description=section.summary))
            for name, section in _ADDED.items()
        },
    )
