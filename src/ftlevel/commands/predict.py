"""`predict`: add answer columns to rows, one window of rows at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from ftlevel.artifacts.places import load_run_config
from ftlevel.artifacts.row_files import check_row_file, row_file_type
from ftlevel.artifacts.row_sinks import LineStream, RowColumns, RowFile, RowList, RowSink
from ftlevel.config import PredictConfig, TrainConfig, build_config
from ftlevel.config.section import Choice
from ftlevel.data.formats.columns import resolve_column
from ftlevel.data.formats.detect import explain_columns
from ftlevel.data.prepare.inference import (
    Prompts,
    QueryRow,
    RowSource,
    in_memory_rows,
    open_rows,
    windows,
)
from ftlevel.data.sources.readers import ReadOptions, is_pattern
from ftlevel.data.sources.streams import Reader, refuse_media_columns
from ftlevel.errors import ConfigError, InputError, Interrupted, join_names
from ftlevel.evaluation.answers import PROMPTS, InferenceModel, RowCounts, predict_rows
from ftlevel.events import Listener, NullListener
from ftlevel.models.hardware import choose_device, choose_threads
from ftlevel.models.kinds import width_of
from ftlevel.models.loading import load_config, silence_loggers
from ftlevel.models.quantization import quantization_form
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.tasks.base import OutputOptions
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import get_dtype_source, resolve_model

WINDOW = 2_048
"""Rows sorted by length together, for tasks that score."""

TEXT_BATCHES = 16
"""Batches per window for tasks that generate text; output is saved after each window."""

Answers = Mapping[str, str]
"""Output column → the task's name for the answer."""


@dataclass(frozen=True)
class Predictions:
    """Result: rows with answers (None if written to a file or stream), and the `--json` summary."""

    rows: list[dict[str, Any]] | None
    summary: Mapping[str, Any]


def predict(
    config: PredictConfig,
    rows: Any = None,
    *,
    stream: IO[str] | None = None,
    listener: Listener | None = None,
) -> Predictions:
    """Add answers to rows, in their order.

    Args:
        config: configuration of the prediction.
        rows: input instead of `config.dataset`: a DataFrame, an Arrow table, a `datasets.Dataset`,
            or an iterable of dicts.
        stream: destination of JSON lines without `config.output`; None collects the rows.
        listener: receives progress; silent by default.

    Raises:
        ConfigError: the output or a column exists already, or an option is not supported.
        InputError: the model or the rows cannot be read, or a row cannot be answered.
        Interrupted: Ctrl-C; written rows are kept and can be resumed from.
    """
    listener = listener or NullListener()
    _check(config, rows)
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_loggers())
        listener.stage("opening the data")
        job = _prepare(config, rows, stream, stack)
        listener.choices("predict", job.choices)
        try:
            _answer_all(config, job, listener)
            job.sink.finalize()
        except KeyboardInterrupt:
            raise Interrupted(job.tally.format_stop_message()) from None
    for warning in job.tally.warnings():
        listener.warn(warning)
    collected = job.sink.rows if isinstance(job.sink, RowList) else None
    return Predictions(collected, _summarize(config, job))


@dataclass(frozen=True)
class _PredictJob:
    """Prepared prediction, before weights are loaded; `questions` yields the unanswered rows."""

    ref: ModelRef
    device: str
    own: TrainConfig
    wanted: OutputOptions
    answers: Answers
    questions: Iterator[QueryRow]
    sink: RowSink
    tally: RowCounts
    choices: Sequence[Choice]


def _check(config: PredictConfig, rows: Any) -> None:
    if (rows is None) == (config.dataset is None):
        raise ConfigError(
            "no rows to predict. Add --dataset FILE, or - for stdin."
            if rows is None
            else f"both rows and --dataset {config.dataset} are given. Use one of them."
        )
    if config.output is not None:
        check_row_file("--output", config.output, resume=config.resume, overwrite=config.overwrite)


def _prepare(
    config: PredictConfig, rows: Any, stream: IO[str] | None, stack: contextlib.ExitStack
) -> _PredictJob:
    """Resolve the model, open and check the rows, and skip rows already written."""
    device = choose_device(config.device)
    ref = resolve_model(
        config.name, config.task, config.base_model, device=device.value, dtype=config.dtype
    )
    task, settings = TASKS[ref.card.task], _settings(ref)
    source, file = _open(config, rows, task, settings)
    mapping = _mapping(config, settings, task, source)
    shape = task.find_questions(source.leading, mapping, config.format, source.first)
    refuse_media_columns(shape.unused, source.first, file.shown if file else "the rows")
    output_options = OutputOptions(
        config.probabilities, config.top_k or 0, config.normalize, config.dims
    )
    types = task.answer_columns(shape, ref.card.labels, ref.card.options, output_options)
    _check_embedding_options(config, task, types.values(), ref)
    answers = {f"{config.column}_{end}" if end else config.column: end for end in types}
    _check_new(config, answers, source, file)
    added = {name: types[end] for name, end in answers.items()}
    sink = _open_sink(config, RowColumns(source.columns, added, source.schema), stream)
    questions = iter(Prompts(source, shape, sink.is_table, config.limit))
    tally = RowCounts(config.output, kept=_skip_written(questions, sink, config))
    stack.callback(_let_go, sink, tally)
    reason = (
        "as in training"
        if mapping and not config.columns
        else explain_columns(shape.columns, config.columns, config.format)
    )
    columns = Choice("columns", shape.description, reason)
    choices = _choices(config, ref, settings, columns, answers, file)
    return _PredictJob(
        ref,
        device.value,
        settings,
        output_options,
        answers,
        questions,
        sink,
        tally,
        [*choices, device, choose_threads()],
    )


def _settings(ref: ModelRef) -> TrainConfig:
    """Returns the run's configuration; without a run, a default one with the card's columns."""
    if ref.run is not None:
        return build_config([load_run_config(ref.run)])
    return TrainConfig(data={"columns": ref.card.data.get("columns", {})})


def _open(
    config: PredictConfig, rows: Any, task: BaseTask, settings: TrainConfig
) -> tuple[RowSource, Reader | None]:
    """Open the input; returns its rows, and the file reader (None for in-memory rows)."""
    ignored = config.ignore_columns or settings.data.ignore_columns
    if config.dataset is None:
        return in_memory_rows(rows, ignored), None
    roles = [names for shape in task.questions for names in shape.roles.values()]
    columns = {name for names in roles for name in names}
    columns |= {*config.columns.values(), *settings.data.columns.values()}
    return open_rows(
        config.dataset, ReadOptions(config.input_format, config.subset, columns, ignored)
    )


def _mapping(
    config: PredictConfig, settings: TrainConfig, task: BaseTask, source: RowSource
) -> Mapping[str, str]:
    """Returns role -> column: `--map` if given, else the training columns that the rows have."""
    if config.columns:
        return config.columns
    roles = {role for shape in task.questions for role in shape.roles}
    inner = {role for shape in task.questions for role in shape.inner}
    columns = {
        **task.column_mapping(source.leading, settings.data, source.first),
        **settings.data.columns,
    }
    return {
        role: column
        for role, column in columns.items()
        if role in inner or (role in roles and resolve_column(column, source.leading) is not None)
    }


def _check_new(
    config: PredictConfig, answers: Answers, source: RowSource, file: Reader | None
) -> None:
    """Reject answer columns that exist in the rows."""
    existing = [repr(name) for name in answers if name in source.columns]
    if existing:
        whose = "the rows have" if file is None else f"{file.shown} has"
        raise ConfigError(
            f"--column {config.column}: {whose} {join_names(existing)} already, and columns are "
            "not overwritten. Choose another with --column."
        )


def _check_embedding_options(
    config: PredictConfig, task: BaseTask, types: Iterable[str], ref: ModelRef
) -> None:
    """Raise `ConfigError` for options of embeddings that do not apply, or too many dimensions."""
    if "embedding" not in types:
        for flag, is_given in (
            ("--normalize", config.normalize is not None),
            ("--dims", config.dims is not None),
        ):
            if is_given:
                raise ConfigError(f"{flag}: --task {task.name} gives no embeddings. Drop it.")
    elif config.dims is not None and config.dims > (width := width_of(load_config(ref.source))):
        raise ConfigError(
            f"--dims {config.dims}: the embeddings of {config.name} have {width} dimensions. Use "
            "at most that many."
        )


def _let_go(sink: RowSink, tally: RowCounts) -> None:
    """Close the output file after an error; delete it if it has no rows."""
    if isinstance(sink, RowFile) and not (tally.kept or tally.answered):
        sink.discard()
    else:
        sink.close()


def _open_sink(config: PredictConfig, columns: RowColumns, stream: IO[str] | None) -> RowSink:
    if config.output is not None:
        return row_file_type("--output", config.output)(config.output, columns)
    return RowList() if stream is None else LineStream(stream)


def _skip_written(questions: Iterator[QueryRow], sink: RowSink, config: PredictConfig) -> int:
    """Open the output; with `--resume`, skip answered `questions` (modified) and count them."""
    if not isinstance(sink, RowFile):
        return 0
    count = 0
    for written in sink.load_existing() if config.resume else ():
        row = next(questions, None)
        if row is None:
            raise InputError(
                f"--resume: {sink.existing} has more rows than the {count:,} of --dataset "
                f"{config.dataset}. Choose another --output."
            )
        if sink.normalize(row.row) != written:
            raise InputError(
                f"--resume: row {count + 1:,} of {sink.existing} is not {row.place}. Use the "
                f"same rows as before, or choose another --output."
            )
        count += 1
    sink.open(count)
    return count


def _choices(
    config: PredictConfig,
    ref: ModelRef,
    settings: TrainConfig,
    columns: Choice,
    answers: Answers,
    file: Reader | None,
) -> list[Choice]:
    task, quant = TASKS[ref.task], ref.quantization
    data = "given" if file is None else file.shown
    if config.dataset is not None and is_pattern(config.dataset):
        data = config.dataset
    choices = [
        Choice("task", task.name),
        Choice("base", ref.base),
        *([Choice("quantization", quantization_form(quant))] if quant["kind"] != "none" else []),
        Choice("rows", data, "; ".join(file.notes) if file else ""),
        columns,
        Choice("answers", join_names(answers, 6)),
        Choice("dtype", ref.card.dtype, get_dtype_source(ref, config.dtype)),
    ]
    if task.generates_text and config.max_new_tokens is None:
        reason = "as in training" if ref.run else "default"
        choices.append(Choice("max new tokens", settings.train.max_new_tokens, reason))
    if _cuts(config, settings) and config.overlong is None:
        choices.append(Choice("overlong", "truncate-prompt", "as in training"))
    return choices


def _cuts(config: PredictConfig, settings: TrainConfig) -> bool:
    return (config.overlong or settings.data.overlong) == "truncate-prompt"


def _answer_all(config: PredictConfig, job: _PredictJob, listener: Listener) -> None:
    """Answer the remaining rows; weights are loaded only if there are any."""
    tally, task = job.tally, TASKS[job.ref.task]
    size = TEXT_BATCHES * (config.batch_size or PROMPTS) if task.generates_text else WINDOW
    batches = windows(job.questions, size)
    first = next(batches, None)
    if first is None:
        return
    listener.stage("loading the model")
    trained = job.ref.load(job.device)
    for note in trained.notes:
        listener.warn(note)
    section = job.own.train
    writing = GenerationOptions(
        config.max_new_tokens or section.max_new_tokens, **config.decoding(section)
    )
    model = InferenceModel(trained, writing, config.batch_size, truncate=_cuts(config, job.own))
    listener.stage("predicting")
    listener.answered(tally.kept, None)
    began = time.perf_counter()
    with model.inference():
        for window in chain([first], batches):
            answers = _answer(model, window, job.wanted, config, tally)
            job.sink.write(
                [_join(row, answer, job) for row, answer in zip(window, answers, strict=True)]
            )
            tally.answered += len(window)
            tally.shortened = model.shortened
            tally.seconds = time.perf_counter() - began
            listener.answered(tally.kept + tally.answered, window[-1].share)


def _answer(
    model: InferenceModel,
    window: Sequence[QueryRow],
    output_options: OutputOptions,
    config: PredictConfig,
    tally: RowCounts,
) -> list[Mapping[str, Any]]:
    """Returns the answer columns per row, empty if skipped; may raise InputError for a bad row."""
    answerable = [i for i, row in enumerate(window) if not row.fault]
    faults = {i: row.fault for i, row in enumerate(window) if row.fault}
    if faults and config.on_bad_row == "error":
        raise InputError(tally.format_failures(window, faults))
    answers = predict_rows(model, [window[i].question for i in answerable], output_options)
    faults |= {answerable[number]: error for number, error in answers.refused.items()}
    if faults and config.on_bad_row == "error":
        raise InputError(tally.format_failures(window, faults))
    tally.skip(window, faults)
    columns: list[Mapping[str, Any]] = [{} for _ in window]
    for number, reply in zip(answerable, answers.replies, strict=True):
        if reply is not None:
            columns[number] = reply.columns
    return columns


def _join(row: QueryRow, answer: Mapping[str, Any], job: _PredictJob) -> dict[str, Any]:
    """Returns the input row with the answer columns added; None where there is no answer."""
    existing = [repr(name) for name in job.answers if name in row.row]
    if existing:  # later JSON Lines rows may have new columns
        raise InputError(
            f"{row.place}: has {join_names(existing)} already. Choose another column with --column."
        )
    return {**row.row, **{name: answer.get(end) for name, end in job.answers.items()}}


def _summarize(config: PredictConfig, job: _PredictJob) -> dict[str, Any]:
    tally = job.tally
    return {
        "name": config.name,
        "task": job.ref.task,
        "dtype": job.ref.compute_dtype(job.device),
        "dataset": config.dataset,
        "output": None if config.output is None else str(config.output),
        "columns": list(job.answers),
        "rows": tally.kept + tally.answered,
        "kept": tally.kept,
        "skipped": tally.skipped,
        "shortened": tally.shortened,
        "seconds": tally.seconds,
        "rows_per_s": tally.answered / tally.seconds if tally.answered else 0.0,
    }
