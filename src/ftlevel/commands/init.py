"""`init`: propose dataset, task, model, method and epochs, and write a recipe.

Values that `train` would choose are added as comments with reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote as quote_shell
from typing import Any

from ftlevel.config import Layer, TrainConfig, build_config, put
from ftlevel.config.section import Choice
from ftlevel.config.sections import DEFAULT_DATASET, DEFAULT_MODEL
from ftlevel.data.formats.columns import column_for_flag, format_map_flags
from ftlevel.data.prepare.loading import read_dataset
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.errors import InputError, join_names, quote
from ftlevel.models.hardware import device_memory, select_device
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import build_task_model, load_config, silence_loggers
from ftlevel.models.sources import resolve_source
from ftlevel.tasks import TASKS
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.plan.run import Run

_FILE_TYPES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".conll")
_FOR_ENCODERS = ("text-classification", "token-classification", "question-answering", "masked-lm")
_INFERRED = (*_FOR_ENCODERS[:3], "preference", "summarization", "text-generation")
"""Tasks inferred from columns, those with the most required columns first."""
_REQUIRED_COLUMNS = {"preference": ("chosen", "rejected"), "summarization": ("summary",)}
"""Columns required to infer a task whose format also matches other data."""
_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EPOCHS = 3
_SPLIT = 0.1
_ENOUGH = 50  # fewest rows for a validation split
_OF_ADAPTER = ("model.name_or_path", "method.kind")  # what --adapter determines
_ORDER = "task model quant method data train"
_BYTES = 2  # per 16-bit weight
_HALF = 0.5  # most memory for weights; a step needs the rest


@dataclass(frozen=True)
class SetupQuestion:
    """Question for the field at `path`; `check` raises ConfigError if the answer is invalid."""

    path: str
    flag: str
    prompt: str
    default: Callable[[TrainConfig], Choice]
    check: Callable[[TrainConfig], object] = bool


@dataclass(frozen=True)
class Draft:
    """Proposed recipe: its text, configuration and suggested values, and the training command."""

    text: str
    config: TrainConfig
    defaults: list[Choice]
    steps: int
    command: str


def draft(layers: list[Layer], file: Path, answer: Callable[[SetupQuestion, Choice], str]) -> Draft:
    """Returns a recipe from `layers` (modified), to which the values from `answer` are added.

    `answer` is called with each open question and the suggested value. `file` is named in the
    recipe; nothing is written. Raises ConfigError if `train` could not start.
    """
    defaults = []
    with silence_loggers():
        for question in QUESTIONS:
            config = build_config(layers)
            if config.model.adapter is not None and question.path in _OF_ADAPTER:
                continue
            if not _is_set(config, question.path):
                default = question.default(config)
                value = answer(question, default)
                layers.append(_layer(question.path, value, question.flag))
                if value == default.value:
                    defaults.append(default)
            question.check(build_config(layers))
        run = _resolve(layers, defaults)
    config = build_config(layers)
    command = f"ftlevel train --recipe {quote_shell(str(file))} --output-dir runs/{run.name}"
    values = config.model_dump(mode="json", exclude_unset=True)
    lines = [*_head(run.config, command, file), *_format_lines(values, run, defaults)]
    return Draft("\n".join(lines) + "\n", config, defaults, run.schedule.steps, command)


def check_value(layers: list[Layer], question: SetupQuestion, value: str) -> None:
    """Raise ConfigError if `value`, merged over `layers`, is invalid for the question."""
    with silence_loggers():
        question.check(build_config([*layers, _layer(question.path, value, question.flag)]))


def _layer(path: str, value: Any, location: str) -> Layer:
    layer = Layer()
    put(layer, tuple(path.split(".")), value, location)
    return layer


def _is_set(config: TrainConfig, path: str) -> bool:
    section, _, name = path.partition(".")
    if section not in config.model_fields_set:
        return False
    return not name or name in getattr(config, section).model_fields_set


def _resolve(layers: list[Layer], defaults: list[Choice]) -> Run:
    """Returns the resolved run; if it lacks validation rows, adds a split to both arguments."""
    config, adapter, _ = resolve_adapter(build_config(layers))
    run = resolve(config, adapter=adapter)
    is_small = len(run.data.train) < _ENOUGH
    if is_small or run.data.validation or _is_set(config, "data.validation_split"):
        return run
    layers.append(_layer("data.validation_split", _SPLIT, "--validation-split"))
    defaults.append(Choice("validation_split", _SPLIT, "the data has no validation rows"))
    return _resolve(layers, defaults)


def _default_dataset(_: TrainConfig) -> Choice:
    """Returns the only data file in ./, or the built-in examples; raises InputError for several."""
    files = sorted(path.name for path in Path().iterdir() if path.suffix.lower() in _FILE_TYPES)
    if len(files) > 1:
        raise InputError(
            f"several data files found ({join_names(files, 6)}): choose one with --dataset"
        )
    if files:
        return Choice("dataset", files[0], "the only file of rows in this directory")
    return Choice("dataset", DEFAULT_DATASET, "no file of rows in this directory")


def _default_task(config: TrainConfig) -> Choice:
    data = config.data
    if data.dataset.startswith("builtin:"):
        return Choice("task", "summarization", "docstrings have a first line")
    table = _table(config)
    columns = {column.lower() for column in table.column_names}
    for name in filter(TASKS.get, _INFERRED):
        try:
            format_ = TASKS[name].get_format(table.column_names, data, table.rows[:CHUNK_ROWS])
        except InputError:
            continue
        if columns.issuperset(_REQUIRED_COLUMNS.get(name, ())):
            return Choice("task", name, f"the columns are {format_.name}")
    names = [column_for_flag(column, table.column_names) for column in table.column_names]
    raise InputError(
        f"{data.dataset}: the columns {join_names(map(quote, table.column_names))} do not "
        f"determine a task. Name the task, for example: ftlevel init --dataset {data.dataset} "
        f"--task text-generation {format_map_flags({'prompt': names[0], 'completion': names[-1]})}"
    )


def _default_model(config: TrainConfig) -> Choice:
    name, kind = (_ENCODER, "encoder") if config.task in _FOR_ENCODERS else (_DECODER, "decoder")
    if config.data.dataset.startswith("builtin:"):
        return Choice("model", DEFAULT_MODEL, "built into ftlevel")
    try:
        resolve_source(name)
    except InputError:
        message = f"built into ftlevel, for a first try; {name} is not available here"
        return Choice("model", DEFAULT_MODEL, message)
    return Choice("model", name, f"a small {kind}")


def _default_method(config: TrainConfig) -> Choice:
    """Returns `qlora` if 16-bit weights would exceed half of the memory, else `lora`."""
    base = load_config(_source(config))
    shape = build_task_model(base, _auto_class(config, base))
    weights = _BYTES * sum(parameter.numel() for parameter in shape.parameters())
    memory = device_memory(select_device(config.model.device).value)
    if weights > _HALF * memory:
        return Choice(
            "method",
            "qlora",
            f"about {weights / 2**30:,.0f} GiB of weights in 16 bits, {memory / 2**30:,.0f} GiB of "
            "memory",
        )
    return Choice("method", "lora", "the most common PEFT method")


def _source(config: TrainConfig) -> Any:
    model = config.model
    return resolve_source(model.name_or_path, model.revision, model.trust_remote_code)


def _table(config: TrainConfig) -> Any:
    return read_dataset(config.data.dataset, config.data, config.data.split).train


def _check_dataset(config: TrainConfig) -> None:
    if not config.data.dataset.startswith("builtin:"):
        _table(config)


def _check_task(config: TrainConfig) -> None:
    if not config.data.dataset.startswith("builtin:"):
        table = _table(config)
        TASKS[config.task].get_format(table.column_names, config.data, table.rows[:CHUNK_ROWS])


def _check_model(config: TrainConfig) -> None:
    _auto_class(config, load_config(_source(config)))


def _auto_class(config: TrainConfig, base: Any) -> str:
    return TASKS[config.task].auto_class(model_kind(base), base.model_type)


QUESTIONS = (
    SetupQuestion(
        "data.dataset",
        "--dataset",
        "Dataset: a file, a directory or a Hub id",
        _default_dataset,
        _check_dataset,
    ),
    SetupQuestion("task", "--task", "Task", _default_task, _check_task),
    SetupQuestion(
        "model.name_or_path",
        "--model",
        "Model: a directory, a .gguf file or a Hub id",
        _default_model,
        _check_model,
    ),
    SetupQuestion("method.kind", "--method", "Method (ftlevel list-methods)", _default_method),
    SetupQuestion(
        "train.num_train_epochs",
        "--num-train-epochs",
        "Number of training epochs",
        lambda _: Choice("epochs", str(_EPOCHS), "the best evaluation is kept"),
    ),
)


def _head(config: TrainConfig, command: str, file: Path) -> Iterator[str]:
    yield f"# {config.task}: {config.data.dataset} with {config.model.name_or_path}."
    yield "#"
    name = quote_shell(str(file))
    yield f"# Check first    ftlevel preview {name}     (what the model will see)"
    yield f"#                ftlevel plan {name}        (memory and time)"
    yield f"# Command        {command}"
    yield "#"
    yield "# Settings after a # are defaults with reasons. All settings: ftlevel train --schema."


def _field_comments(run: Run, defaults: list[Choice]) -> Mapping[str, str]:
    choices = {choice.name: choice for choice in run.choices}
    sources = {choice.name: choice.reason for choice in defaults}
    columns = choices.get("columns")
    return {
        "task": sources.get("task", "") or (str(columns) if columns else ""),
        "model.name_or_path": choices["model"].reason,
        "method.kind": choices["method"].reason,
        "data.dataset": choices["data"].reason.partition(";")[0],
        "data.validation_split": sources.get("validation_split", ""),
        "train.num_train_epochs": f"{run.schedule.steps:,} steps",
        "quant.kind": str(choices["base"].value) if "base" in choices else "",
    }


def _resolved_values(run: Run) -> Mapping[str, list[tuple[str, Any, str]]]:
    """Returns section → (name, value, reason) of values that `train` would choose."""
    sources = {choice.name: choice.reason for choice in run.choices}
    train, schedule = run.config.train, run.schedule
    rates = [("learning_rate", schedule.learning_rate, sources.get("learning rate", ""))]
    if schedule.head_learning_rate is not None:
        message = "defaults to learning_rate if that is set"
        rates.append(("head_learning_rate", schedule.head_learning_rate, message))
    resolved = {
        "method": [
            (name, getattr(run.config.method, name), "")
            for name in ("r", "lora_alpha", "lora_dropout", "target_modules")
            if getattr(run.config.method, name, None) is not None
        ],
        "data": [("max_length", run.data.max_length, sources.get("max length", ""))],
        "train": [
            *((name, float(f"{rate:.3g}"), message) for name, rate, message in rates),
            ("per_device_train_batch_size", train.per_device_train_batch_size, ""),
            ("gradient_accumulation_steps", train.gradient_accumulation_steps, ""),
            ("seed", train.seed, ""),
        ],
    }
    return {
        section: [
            line for line in lines if line[0] not in getattr(run.config, section).model_fields_set
        ]
        for section, lines in resolved.items()
    }


def _format_lines(values: Mapping[str, Any], run: Run, defaults: list[Choice]) -> Iterator[str]:
    """Yields the lines of the recipe; values that `train` would choose are commented out."""
    field_comments, resolved = _field_comments(run, defaults), _resolved_values(run)
    for section in sorted(values, key=lambda name: (name not in _ORDER, _ORDER.find(name))):
        fields = values[section]
        if not isinstance(fields, dict):
            yield _line(section, fields, field_comments.get(section, ""))
            continue
        yield f"{section}:"
        for name, value in fields.items():
            yield "  " + _line(name, value, field_comments.get(f"{section}.{name}", ""))
        for name, value, reason in resolved.get(section, []):
            yield "  # " + _line(name, value, reason)


def _line(name: str, value: Any, note: str) -> str:
    import yaml

    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, (dict, list)):
        text = f"{name}: {yaml.safe_dump(value, default_flow_style=True, width=10_000)}"
    else:
        text = yaml.safe_dump({name: number}, width=10_000, allow_unicode=True)
    return text.rstrip("\n") + (f"  # {' '.join(note.split())}" if note else "")
