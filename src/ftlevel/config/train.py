"""Configuration of a training run, and checks across its sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator

from ftlevel.config.embedding import EMBEDDING_TASKS, EmbeddingConfig
from ftlevel.config.methods import SPECS, LoraSpec, MethodConfig
from ftlevel.config.output import OutputConfig
from ftlevel.config.preference import (
    DistillationConfig,
    PreferenceConfig,
    normalize_loss,
    validate_distillation,
)
from ftlevel.config.reading import resolve_aliases
from ftlevel.config.reranking import RERANKING_TASKS, RerankingConfig
from ftlevel.config.section import TaskSection, flag_of
from ftlevel.config.sections import DataConfig, ModelConfig, QuantConfig, Section, SpeedConfig
from ftlevel.config.tasks import TASKS, TaskName
from ftlevel.config.trainer import TrainerConfig, validate_optimizer
from ftlevel.errors import join_names, with_article
from ftlevel.extensions import loaded

T = TypeVar("T", bound=TaskSection)

_ADDED: dict[str, type[TaskSection]] = loaded("sections")
SECTIONS: dict[str, type[TaskSection]] = {
    "preference": PreferenceConfig,
    "embedding": EmbeddingConfig,
    "reranking": RerankingConfig,
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
    preference: PreferenceConfig = Field(
        default_factory=PreferenceConfig, description="Preference loss."
    )
    embedding: EmbeddingConfig = Field(
        default_factory=EmbeddingConfig, description="Settings of an embedding model."
    )
    reranking: RerankingConfig = Field(default_factory=RerankingConfig, description="Ranking loss.")
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
                yield (
                    f"{path} has no effect: it is for {join_names(owners)}, and this is "
                    f"{self.task} with {with_article(kind)}."
                )

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
        for name in ("preference", *_ADDED):  # their loss depends on the task, or determines it
            if isinstance(section := sections.get(name), Section):
                sections[name] = {n: getattr(section, n) for n in section.model_fields_set}
        values, _ = resolve_aliases(sections)
        if isinstance(values.get("method"), dict):
            values["method"] = {"kind": "lora", **values["method"]}
        return normalize_loss(values)

    @model_validator(mode="after")
    def _validate_rules(self) -> TrainConfig:
        if messages := [*_validate_quantization(self), *_validate_sections(self)]:
            raise ValueError("\n".join(messages))
        return self


def _validate_quantization(config: TrainConfig) -> Iterator[str]:
    quant = config.quant
    yield from config.method.validate_quant(quant)
    if quant.kind != "4bit":
        for flag, values in (
            ("--double-quant", quant.double_quant),
            ("--quant-type fp4", quant.quant_type != "nf4"),
        ):
            if values:
                yield (
                    f"{flag} belongs to --quant 4bit, and --quant is {quant.kind}. "
                    f"Use --quant 4bit, or drop {flag.split()[0]}."
                )


def _validate_sections(config: TrainConfig) -> Iterator[str]:
    if config.model.dtype == "float16" and config.model.device == "cpu":
        yield (
            "--dtype float16 cannot be used on the CPU, which computes it in software and "
            "overflows in training. Use --dtype bfloat16 or float32."
        )
    if config.output.overwrite and config.output.resume:
        yield "--resume keeps a run and --overwrite replaces it. Use one of them."
    if config.output.resume and config.output.dir is None:
        yield "--resume needs the run to resume. Add --output-dir RUN."
    if config.train.max_restarts and (config.train.num_processes or 1) == 1:
        yield (
            "--max-restarts needs several processes (--num-processes N). To continue a single "
            "process, use --resume."
        )
    elif config.train.max_restarts and config.output.dir is None:
        yield "--max-restarts needs the run to resume. Add --output-dir RUN."
    if config.train.on_nonfinite == "rollback" and config.train.save_strategy == "no":
        yield (
            "--on-nonfinite rollback goes back to a checkpoint, and --save-strategy no writes "
            "none. Use --save-steps N, or --on-nonfinite skip."
        )
    if config.speed.memory_gib is not None and config.speed.tokens_per_micro_batch != "memory":
        yield (
            f"speed.memory_gib={config.speed.memory_gib:g} needs --auto-micro-batch, which is off. "
            "Add it, or drop speed.memory_gib."
        )
    yield from validate_optimizer(config.train)
    if config.train.focal_gamma and config.train.label_smoothing_factor:
        yield (
            f"--focal-gamma {config.train.focal_gamma:g} and --label-smoothing-factor cannot be "
            f"combined. Use one of them."
        )
    yield from _validate_task_sections(config)
    yield from _validate_strategies(config)
    sets, mix = 1 + len(config.data.also), config.data.mix
    if mix is not None and len(mix) != sets:
        yield (
            f"--mix has {len(mix)} share{'s' * (len(mix) != 1)} for {sets} data "
            f"set{'s' * (sets != 1)}. Give one share for each --dataset."
        )
    yield from _validate_data(config)
    yield from _validate_stdin(config)


def _validate_task_sections(config: TrainConfig) -> Iterator[str]:
    for name, section in SECTIONS.items():
        own = getattr(config, name)
        if config.task in section.tasks:
            yield from own.validate_run(config)
        elif fields := own.changed:
            flags = join_names(flag_of(name, field) for field in fields)
            yield (
                f"{flags}: for --task {name}, and --task is {config.task}. Drop it, or change the "
                "task."
            )
    learners = [task for added in _ADDED.values() if added.has_teacher for task in added.tasks]
    smoothing = config.train.label_smoothing_factor
    yield from validate_distillation(config.task, config.distillation, smoothing, learners)


def _validate_strategies(config: TrainConfig) -> Iterator[str]:
    train, output = config.train, config.output
    for name, strategy, steps in (
        ("eval", train.eval_strategy, train.eval_steps),
        ("save", train.save_strategy, train.save_steps),
    ):
        if steps is not None and strategy in ("no", "epoch", "best"):
            yield (
                f"--{name}-steps {steps:g} is not used by --{name}-strategy {strategy}. "
                "Drop one of them."
            )
    if output.run_name is not None and output.dir is not None and not output.report_to:
        yield (
            f"--run-name {output.run_name} names the directory under runs/ and the run in a "
            "tracker; --output-dir and --report-to none leave it unused. Drop it."
        )
    if output.tracker_project is not None and not output.report_to:
        yield (
            f"--tracker-project {output.tracker_project} needs a tracker. Add --report-to wandb "
            f"(or another), or drop it."
        )
    if output.hub_private and output.push_to_hub is None:
        yield "--hub-private requires --push-to-hub. Add --push-to-hub NAME, or drop it."
    yield from _validate_retrieval(config)
    if config.data.validation_file is not None and config.data.validation_split:
        yield (
            "--validation-file and --validation-split both define the validation rows. Use one "
            "of them."
        )
    yield from _validate_best_model(train)


def _validate_retrieval(config: TrainConfig) -> Iterator[str]:
    data = config.data
    files = {"--qrels": data.qrels, "--corpus": data.corpus}
    names = [f"{flag} {path}" for flag, path in files.items() if path is not None]
    if names and config.task not in EMBEDDING_TASKS:
        yield f"{join_names(names)}: for --task embedding, and --task is {config.task}. Drop it."
    elif data.qrels is not None and (data.validation_file or data.validation_split):
        other = "--validation-file" if data.validation_file else "--validation-split"
        yield f"--qrels and {other} both define the validation rows. Use one of them."


def _validate_best_model(train: TrainerConfig) -> Iterator[str]:
    values = {
        "--early-stopping-patience": train.early_stopping_patience is not None,
        "--load-best-model-at-end": bool(train.load_best_model_at_end),
        "--save-strategy best": train.save_strategy == "best",
    }
    names = [name for name, is_requested in values.items() if is_requested]
    if names and train.eval_strategy == "no":
        yield (
            f"{names[0]} needs evaluations during training, and --eval-strategy no turns them "
            f"off. Use --eval-strategy epoch or steps."
        )
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        yield (
            f"--early-stopping-threshold {train.early_stopping_threshold:g} needs "
            f"--early-stopping-patience N. Add it."
        )
    if train.load_best_model_at_end is False and not names:
        for name, value in (
            ("metric-for-best-model", train.metric_for_best_model),
            ("greater-is-better", train.greater_is_better),
        ):
            if value is not None:
                yield (
                    f"--{name} {str(value).lower()} has no effect with "
                    f"--no-load-best-model-at-end. Drop one of them."
                )


def _validate_stdin(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if (config.train.num_processes or 1) > 1:
        yield from [
            f"--num-processes cannot be used with {name}, a pipe, which only one process can "
            "read. Save the rows to a file."
            for name in (data.dataset, *data.also, data.validation_file or "")
            if Path(name).is_fifo()
        ]
    if data.validation_file == "-":
        yield "--validation-file -: stdin is for --dataset. Name a file."
    if "-" not in (data.dataset, *data.also):
        return
    if config.output.resume:
        yield (
            "--resume cannot be used with --dataset -: the rows of the run came through a pipe and "
            "are no longer available. Save them to a file and train on that."
        )
    if (config.train.num_processes or 1) > 1:
        yield (
            "--num-processes cannot be used with --dataset -, which only one process can read. "
            "Save the rows to a file."
        )


_GENERATION_TASKS = ("text-generation", "summarization", "translation", "preference")
_OWNERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "train.num_beams",
            "train.temperature",
            "train.top_p",
            "train.predict_with_generate",
            "train.max_generate_samples",
            "train.max_new_tokens",
        ),
        _GENERATION_TASKS,
    ),
    "data.doc_stride": ("question-answering",),
    "data.mlm_probability": ("masked-lm",),
    "data.labels": ("text-classification", "token-classification"),
    "data.max_target_length": ("encoder-decoder",),
}
"""Dotted field → tasks, or kinds of models, that use it."""


def _list_added_tasks(path: str) -> list[str]:
    """Returns the tasks of extensions that use the dotted field `path` of another section."""
    return [task for own in SECTIONS.values() if path in own.uses for task in own.tasks]


_NO_PROMPT = ("token-classification", "question-answering", "masked-lm")


def _validate_data(config: TrainConfig) -> Iterator[str]:
    task, data = config.task, config.data
    if data.overlong == "split" and task not in ("text-generation", "masked-lm"):
        allowed = "drop" if task in _NO_PROMPT else "drop or truncate-prompt"
        yield (
            f"--overlong split cuts plain text into several rows and cannot be used with --task "
            f"{task}. Use --overlong {allowed}."
        )
    if data.overlong == "truncate-prompt" and task in _NO_PROMPT:
        yield (
            f"--overlong truncate-prompt cannot be used with --task {task}, whose rows have no "
            "prompt. Use --overlong drop."
        )
    allowed = ""
    if data.overlong == "truncate" and task not in (*EMBEDDING_TASKS, *RERANKING_TASKS):
        allowed = "drop" if task in _NO_PROMPT else "drop or truncate-prompt"
    elif data.overlong == "truncate-prompt" and task in EMBEDDING_TASKS:
        allowed = "truncate"
    if allowed:
        yield (
            f"--overlong {data.overlong} cannot be used with --task {task}. Use --overlong "
            f"{allowed}."
        )
    for flag, name in (("--system", "system"), ("--train-on-inputs", "train_on_inputs")):
        owners = (*_GENERATION_TASKS, *_list_added_tasks(f"data.{name}"))
        if getattr(data, name) and task not in owners:
            yield (
                f"{flag} is for tasks that write text, and --task is {task}. Drop it, or change "
                "the task."
            )
    if data.train_on_inputs and data.overlong == "truncate-prompt":
        yield (
            "--overlong truncate-prompt cuts prompts, and --train-on-inputs supervises them. Use "
            "--overlong drop, or drop one of them."
        )
    for name, owner, values in (
        ("problem_type", "text-classification", data.problem_type != "auto"),
        ("source_language", "translation", data.source_language is not None),
        ("target_language", "translation", data.target_language is not None),
    ):
        if values and task != owner:
            yield (
                f"data.{name} belongs to --task {owner}, and --task is {task}. Drop it, or change "
                "the task."
            )


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
