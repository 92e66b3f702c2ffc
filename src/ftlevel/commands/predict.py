"""`predict`: add answer columns to rows, one window of rows at a time."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from ftlevel.artifacts.files import lock_dir
from ftlevel.artifacts.row_files import check_row_file, row_file_type
from ftlevel.artifacts.row_sinks import LineStream, RowColumns, RowFile, RowList, RowSink
from ftlevel.config import PredictConfig, TrainConfig
from ftlevel.config.section import Choice, check_config
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
from ftlevel.events import Listener, NullListener, Summarized
from ftlevel.models.hardware import select_device, select_threads
from ftlevel.models.kinds import width_of
from ftlevel.models.loading import load_config, silence_loggers
from ftlevel.models.quantization import format_quantization
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.tasks.base import OutputOptions
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import get_dtype_source, resolve_model

WINDOW = 2_048
"""Number of rows that are sorted by length together, for tasks that score."""

TEXT_BATCHES = 16
"""Batches per window for tasks that generate text; output is saved after each window."""

OutputColumns = Mapping[str, str]
"""Name of an output column → name of that value in the task's predictions."""


@dataclass(frozen=True, repr=False)
class Predictions(Summarized):
    """Result of `predict`: `rows`, None if written elsewhere, and `summary`, output of `--json`."""

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
    check_config(config, PredictConfig)
    listener = listener or NullListener()
    _validate(config, rows)
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_loggers())
        listener.stage("opening the data")
        prepared = _prepare(config, rows, stream, stack)
        listener.choices("predict", prepared.choices)
        task = TASKS[prepared.ref.card.task]
        if not task.generates_text:
            for warning in config.unused_decoding(f"--task {task.name} generates no text"):
                listener.warn(warning)
        try:
            _predict_all(config, prepared, listener)
            prepared.sink.finalize()
        except KeyboardInterrupt:
            raise Interrupted(prepared.progress.format_stop_message()) from None
    for warning in prepared.progress.warnings():
        listener.warn(warning)
    collected = prepared.sink.rows if isinstance(prepared.sink, RowList) else None
    return Predictions(collected, _summarize(config, prepared))


@dataclass(frozen=True)
class _PreparedPrediction:
    """Model, columns and input of a prediction; `queries` yields the rows still to be predicted."""

    ref: ModelRef
    device: str
    run_config: TrainConfig
    output_options: OutputOptions
    answers: OutputColumns
    queries: Iterator[QueryRow]
    sink: RowSink
    progress: RowCounts
    choices: Sequence[Choice]


def _validate(config: PredictConfig, rows: Any) -> None:
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
) -> _PreparedPrediction:
    """Resolve model and rows; skip rows already in the output, which `stack` closes."""
    device = select_device(config.device)
    ref = resolve_model(
        config.name, config.task, config.base_model, device=device.value, dtype=config.dtype
    ).with_labels(config.labels)
    task, run_config = TASKS[ref.card.task], ref.run_config
    source, file = _open(config, rows, task, run_config)
    mapping = _mapping(config, run_config, task, source)
    shape = task.get_query_format(source.leading, mapping, config.format, source.first)
    refuse_media_columns(shape.unused, source.first, file.shown if file else "the rows")
    output_options = OutputOptions(
        config.probabilities, config.top_k or 0, config.normalize, config.dims
    )
    types = task.prediction_columns(shape, ref.card.labels, ref.card.options, output_options)
    _validate_embedding(config, task, types.values(), ref)
    answers = {f"{config.column}_{end}" if end else config.column: end for end in types}
    _validate_column_names(config, answers, source, file)
    added = {name: types[end] for name, end in answers.items()}
    sink = _open_sink(config, RowColumns(source.column_names, added, source.schema), stream)
    queries = iter(Prompts(source, shape, sink.is_table, config.limit))
    progress = RowCounts(config.output, kept=_skip_written(queries, sink, config, stack))
    stack.callback(_close, sink, progress)
    message = (
        "as in training"
        if mapping and not config.columns
        else explain_columns(shape.columns, config.columns, config.format)
    )
    columns = Choice("columns", shape.description, message)
    return _PreparedPrediction(
        ref,
        device.value,
        run_config,
        output_options,
        answers,
        queries,
        sink,
        progress,
        [*_choices(config, ref, run_config, columns, answers, file), device, select_threads()],
    )


def _open(
    config: PredictConfig, rows: Any, task: BaseTask, run_config: TrainConfig
) -> tuple[RowSource, Reader | None]:
    """Returns the input rows, and the reader of their file; None for rows in memory."""
    ignored = config.ignore_columns or run_config.data.ignore_columns
    if config.dataset is None:
        return in_memory_rows(rows, ignored), None
    roles = [names for shape in task.query_shapes for names in shape.roles.values()]
    columns = {name for names in roles for name in names}
    columns |= {*config.columns.values(), *run_config.data.columns.values()}
    return open_rows(
        config.dataset, ReadOptions(config.input_format, config.subset, columns, ignored)
    )


def _mapping(
    config: PredictConfig, run_config: TrainConfig, task: BaseTask, source: RowSource
) -> Mapping[str, str]:
    """Returns ftlevel's column name → column of `source`, from `--map` or as in training."""
    if config.columns:
        return config.columns
    roles = {role for shape in task.query_shapes for role in shape.roles}
    inner = {role for shape in task.query_shapes for role in shape.inner}
    columns = {
        **task.column_mapping(source.leading, run_config.data, source.first),
        **run_config.data.columns,
    }
    return {
        role: column
        for role, column in columns.items()
        if role in inner or (role in roles and resolve_column(column, source.leading) is not None)
    }


def _validate_column_names(
    config: PredictConfig, answers: OutputColumns, source: RowSource, file: Reader | None
) -> None:
    existing = [repr(name) for name in answers if name in source.column_names]
    if existing:
        whose = "the rows have" if file is None else f"{file.shown} has"
        raise ConfigError(
            f"--column {config.column}: {whose} {join_names(existing)} already, and columns are "
            "not overwritten. Choose another with --column."
        )


def _validate_embedding(
    config: PredictConfig, task: BaseTask, types: Iterable[str], ref: ModelRef
) -> None:
    given = [name for name in ("normalize", "dims") if getattr(config, name) is not None]
    if given and "embedding" not in types:
        raise ConfigError(f"--{given[0]}: --task {task.name} gives no embeddings. Drop it.")
    if config.dims is not None and config.dims > (width := width_of(load_config(ref.source))):
        raise ConfigError(
            f"--dims {config.dims}: the embeddings of {config.name} have {width} dimensions. Use "
            "at most that many."
        )


def _close(sink: RowSink, progress: RowCounts) -> None:
    """Close the output file after an error; delete it if it has no rows."""
    if isinstance(sink, RowFile) and not (progress.kept or progress.answered):
        sink.discard()
    else:
        sink.close()


def _open_sink(config: PredictConfig, columns: RowColumns, stream: IO[str] | None) -> RowSink:
    if config.output is not None:
        return row_file_type("--output", config.output)(config.output, columns)
    return RowList() if stream is None else LineStream(stream)


def _skip_written(
    queries: Iterator[QueryRow], sink: RowSink, config: PredictConfig, stack: contextlib.ExitStack
) -> int:
    """Skip `queries` (modified) that the output has already; returns the number of those rows.

    The partial file is locked until `stack` closes, so that no other process appends to it.
    """
    if not isinstance(sink, RowFile):
        return 0
    num_rows, lock = 0, functools.partial(lock_dir, sink.partial, flag="--output", noun="process")
    with lock():
        pass
    for written_row in sink.load_previous() if config.resume else ():
        row = next(queries, None)
        if row is None:
            raise InputError(
                f"--resume: {sink.existing} has more rows than the {num_rows:,} of --dataset "
                f"{config.dataset}. Choose another --output."
            )
        if sink.normalize(row.row) != written_row:
            raise InputError(
                f"--resume: row {num_rows + 1:,} of {sink.existing} is not {row.location}. Use the "
                f"same rows as before, or choose another --output."
            )
        num_rows += 1
    sink.open(num_rows)
    stack.enter_context(lock())
    return num_rows


def _choices(
    config: PredictConfig,
    ref: ModelRef,
    run_config: TrainConfig,
    columns: Choice,
    answers: OutputColumns,
    file: Reader | None,
) -> list[Choice]:
    task, quant = TASKS[ref.task], ref.quantization
    data = "given" if file is None else file.shown
    if config.dataset is not None and is_pattern(config.dataset):
        data = config.dataset
    choices = [
        Choice("task", task.name),
        Choice("base", ref.base),
        *([Choice("quantization", format_quantization(quant))] if quant["kind"] != "none" else []),
        Choice("rows", data, "; ".join(file.notes) if file else ""),
        columns,
        Choice("answers", join_names(answers, 6)),
        Choice("dtype", ref.card.dtype, get_dtype_source(ref, config.dtype)),
    ]
    if task.generates_text and config.max_new_tokens is None:
        message = "as in training" if ref.run else "default"
        choices.append(Choice("max new tokens", run_config.max_new_tokens, message))
    if stop_texts := ref.configured_task.stop_texts:
        choices.append(Choice("stop", join_names(map(repr, stop_texts)), "as in training"))
    if _cuts(config, run_config) and config.overlong is None:
        choices.append(Choice("overlong", run_config.data.overlong, "as in training"))
    return choices


def _cuts(config: PredictConfig, run_config: TrainConfig) -> bool:
    return (config.overlong or run_config.data.overlong) in ("truncate", "truncate-prompt")


def _predict_all(config: PredictConfig, prepared: _PreparedPrediction, listener: Listener) -> None:
    progress, task = prepared.progress, TASKS[prepared.ref.task]
    size = TEXT_BATCHES * (config.batch_size or PROMPTS) if task.generates_text else WINDOW
    batches = windows(prepared.queries, size)
    first = next(batches, None)
    if first is None:
        return
    listener.stage("loading the model")
    trained = prepared.ref.load(prepared.device)
    for note in trained.notes:
        listener.warn(note)
    run_config = prepared.run_config
    generation = GenerationOptions(
        config.max_new_tokens or run_config.max_new_tokens, **config.decoding(run_config.train)
    )
    model = InferenceModel(
        trained, generation, config.batch_size, truncate=_cuts(config, prepared.run_config)
    )
    listener.stage("predicting")
    listener.answered(progress.kept, None)
    start_time = time.perf_counter()
    with model.inference():
        for window in chain([first], batches):
            answers = _predict_window(model, window, prepared.output_options, config, progress)
            prepared.sink.write(
                [_join(row, answer, prepared) for row, answer in zip(window, answers, strict=True)]
            )
            progress.answered += len(window)
            progress.shortened = model.shortened
            progress.seconds = time.perf_counter() - start_time
            listener.answered(progress.kept + progress.answered, window[-1].share)


def _predict_window(
    model: InferenceModel,
    window: Sequence[QueryRow],
    output_options: OutputOptions,
    config: PredictConfig,
    progress: RowCounts,
) -> list[Mapping[str, Any]]:
    """Returns column → prediction per row; {} for a bad row, or InputError (`on_bad_row`)."""
    answerable = [i for i, row in enumerate(window) if not row.fault]
    faults = {i: row.fault for i, row in enumerate(window) if row.fault}
    if faults and config.on_bad_row == "error":
        raise InputError(progress.format_failures(window, faults))
    questions = [window[i].question for i in answerable]
    replies, refused = predict_rows(model, questions, output_options)
    faults |= {answerable[number]: error for number, error in refused.items()}
    if faults and config.on_bad_row == "error":
        raise InputError(progress.format_failures(window, faults))
    progress.skip(window, faults)
    columns: list[Mapping[str, Any]] = [{} for _ in window]
    for number, reply in zip(answerable, replies, strict=True):
        if reply is not None:
            columns[number] = reply.columns
    return columns


def _join(
    row: QueryRow, answer: Mapping[str, Any], prepared: _PreparedPrediction
) -> dict[str, Any]:
    existing = [repr(name) for name in prepared.answers if name in row.row]
    if existing:  # later JSON Lines rows may have new columns
        raise InputError(
            f"{row.location}: has {join_names(existing)} already. Choose another column with "
            "--column."
        )
    return {**row.row, **{name: answer.get(end) for name, end in prepared.answers.items()}}


def _summarize(config: PredictConfig, prepared: _PreparedPrediction) -> dict[str, Any]:
    progress = prepared.progress
    return {
        "name": config.name,
        "task": prepared.ref.task,
        "dtype": prepared.ref.compute_dtype(prepared.device),
        "dataset": config.dataset,
        "output": None if config.output is None else str(config.output),
        "columns": list(prepared.answers),
        "rows": progress.kept + progress.answered,
        "kept": progress.kept,
        "skipped": progress.skipped,
        "shortened": progress.shortened,
        "seconds": progress.seconds,
        "rows_per_s": progress.answered / progress.seconds if progress.answered else 0.0,
    }
