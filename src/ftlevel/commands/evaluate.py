"""`evaluate`: score a model and the base on held-out rows, with bootstrap intervals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import check_new_output, rows_fingerprint
from ftlevel.artifacts.paths import DATA_PATHS, check_paths
from ftlevel.artifacts.row_files import row_file_type, save_rows
from ftlevel.config import (
    SPECS,
    EvaluateConfig,
    InMemoryDataset,
    QuantConfig,
    TrainConfig,
    TrainerConfig,
)
from ftlevel.config.section import Choice, check_config
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.formats.labels import are_default_names
from ftlevel.data.prepare.encoder import EncodingContext
from ftlevel.data.prepare.inference import EvaluationRows, load_evaluation_rows
from ftlevel.data.prepare.loading import read_splits
from ftlevel.data.sources.lines import STDIN
from ftlevel.data.sources.table import describe_dropped
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.intervals import (
    ExampleRecord,
    check_metrics,
    interval,
    select_metrics,
    should_generate,
)
from ftlevel.evaluation.scoring import Evaluator, iterate_results
from ftlevel.evaluation.two_models import (
    build_comparison_inputs,
    have_same_inputs,
    resolve_pair,
    select_primary,
)
from ftlevel.events import Listener, NullListener, Summarized
from ftlevel.methods import METHODS
from ftlevel.models.hardware import select_device
from ftlevel.models.loading import silence_loggers
from ftlevel.models.quantization import format_quantization
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.trained.resolve import get_dtype_source, get_original_base, resolve_model
from ftlevel.training.build_trainer import eval_batch_size, get_generation_settings
from ftlevel.training.hooks import hooks_of
from ftlevel.training.plan.schedule import text_positions


@dataclass(frozen=True, repr=False)
class Evaluation(Summarized):
    """Metrics of a model and of its base; `draws`: metric → value on each bootstrap resample."""

    metrics: Mapping[str, float]
    base: Mapping[str, float]
    summary: Mapping[str, Any]
    draws: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """Metrics of a model; `resample(count, seed)` returns each on bootstrap resamples.

    Two scores with equal `units`, the examples, can be compared resample by resample.
    """

    metrics: Mapping[str, float]
    resample: Callable[[int, int], Mapping[str, np.ndarray]]
    units: object = None


def evaluate(config: EvaluateConfig, *, listener: Listener | None = None) -> Evaluation:
    """Score a run, an adapter or a model with the metrics of its task.

    On the validation split of training, the metrics equal those of training.

    Raises:
        ConfigError: the predictions file exists, or `--task` is missing or wrong.
        InputError: the model or the rows cannot be read.
    """
    check_config(config, EvaluateConfig)
    listener = listener or NullListener()
    _check_files(config)
    with silence_loggers():
        device = select_device(config.device)
        ref, other = _resolve(config, device.value)
        listener.stage("reading the data")
        data: Any = config.open_data(ref) or _Rows(config, ref, other)
        listener.stage("loading the model")
        trained = data.ref.load(device.value)
        listener.choices("evaluate", [*data.choices(trained), device])
        for warning in [*trained.notes, *data.list_warnings(trained)]:
            listener.warn(warning)
        score, base = data.score(trained, listener), None
        with _base_of(trained, config, listener) as original:
            if original is not None:
                base = data.score_base(original, listener)
        for warning in data.list_results(trained, score.metrics):
            listener.warn(warning)
        against, other_score = {}, None
        if other is not None:
            listener.stage(f"evaluating {config.name} and {config.against} on the same rows")
            inputs, outputs = data.compute_outputs(trained)
            trained, original = replace(trained, model=None), None  # frees memory for the other
            loaded = other.load(device.value)
            for note in loaded.notes:
                listener.warn(f"{config.against}: {note}")
            other_score = data.score_other(loaded, listener)
            against = {"name": config.against, "metrics": other_score.metrics}
            if inputs is not None and have_same_inputs(ref, other):
                against |= inputs.compare(inputs.outputs_of(loaded), outputs)
        draws: Mapping[str, np.ndarray] = {}
        intervals: dict[str, Any] = {}
        if config.resamples:
            listener.stage("computing confidence intervals")
            resampling = config.resamples, config.seed
            draws = score.resample(*resampling)
            intervals = _compute_intervals(draws, base.resample(*resampling) if base else None)
            if other_score is not None and other_score.units == score.units:
                against |= _paired_intervals(draws, other_score.resample(*resampling))
    summary = {
        "name": config.name,
        "task": trained.task.name,
        "headline": data.headline or trained.objective.headline,
        "data": data.describe(),
        "base_model": trained.ref.base,
        "quantization": trained.ref.quantization,
        "dtype": trained.dtype,
        "metrics": score.metrics,
        "base": base.metrics if base else {},
        **({"against": against} if against else {}),
        **({"resamples": config.resamples, **intervals} if intervals else {}),
    }
    if config.predictions is not None:
        save_rows(config.predictions, list(data.iterate_predictions(trained)))
    return Evaluation(score.metrics, summary["base"], summary, draws)


def _check_files(config: EvaluateConfig) -> None:
    if config.predictions is not None:
        row_file_type("--predictions", config.predictions)
        check_new_output("--predictions", config.predictions)


@contextlib.contextmanager
def _base_of(
    trained: LoadedModel, config: EvaluateConfig, listener: Listener
) -> Iterator[LoadedModel | None]:
    """Yields the base model; None with `--no-base`, a head the base lacks, or an unknown base."""
    full_base = get_original_base(trained.ref) if config.base else None
    if config.base and trained.has_adapter and not trained.ref.card.heads:
        listener.stage("evaluating the base model")
        with trained.without_adapter():
            yield trained
    elif full_base is not None:
        listener.stage("evaluating the base model")
        yield full_base.load(trained.device)
    else:
        yield None


class _Rows:
    """Rows of a task, scored by an `Evaluator`.

    Attributes:
        primary: the model whose run has the settings for reading rows.
        record: results of the trained model per example, and `base_record` those of the base.
    """

    headline = ""

    def __init__(self, config: EvaluateConfig, ref: ModelRef, other: ModelRef | None) -> None:
        self.config, self.primary = config, select_primary(ref, other)
        self.run_config, self.is_own = _get_run_config(config, self.primary)
        self.is_compared = other is not None
        ref.check_head()
        self.rows = self.encode(ref)
        options = self.rows.options
        self.ref = ref if options == ref.card.options else ref.with_card(options=options)
        task, how = self.ref.configured_task, "--max-generate-samples N"
        train = self.run_config.train
        generates = should_generate(train.predict_with_generate, task)
        check_metrics(train.metrics, task, self.ref.objective, generates=generates, how=how)
        config.check_task(self.ref.task)
        added = {"name": config.name, **config.added_options}
        self.hooks = hooks_of(task).evaluation(self.ref, added)
        self.evaluator: Any = None
        self.record: Any = None
        self.base_record: ExampleRecord | None = None

    def encode(self, model: ModelRef) -> EvaluationRows:
        return load_evaluation_rows(
            self.run_config.data,
            self.primary.card,
            self.config.split,
            self._context(model),
            is_own=self.is_own,
            is_typed=bool(self.config.columns),
        )

    def _context(self, ref: ModelRef) -> EncodingContext:
        primary, run_config, train = self.primary, self.run_config, self.run_config.train
        generates = should_generate(train.predict_with_generate, ref.configured_task)
        tokenizer, task, kind = ref.tokenizer, ref.configured_task, ref.model_kind
        positions, name = text_positions(run_config.method, ref.model_config), primary.card.method
        has_virtual_tokens = (
            primary.run is None and name in METHODS and METHODS[name].positions(SPECS[name]())
        )
        if has_virtual_tokens or self.is_compared:  # these or the other model limit the text
            positions = primary.card.max_length or positions
        elif positions and kind == "decoder" and generates:
            positions = max(primary.card.max_length, positions - train.max_new_tokens)
        bounds, seed = LengthBounds(positions), train.seed
        return EncodingContext(task, kind, tokenizer, len(tokenizer), bounds, seed)

    def choices(self, trained: LoadedModel) -> Iterator[Choice]:
        config, rows, ref = self.config, self.rows, trained.ref
        if not config.base:
            base = "not scored"
        elif get_original_base(ref):
            base = f"evaluated for comparison: {ref.card.base['name']}"
        elif not trained.has_adapter:
            base = "there is no adapter to disable"
        elif ref.card.heads:
            heads = ", ".join(dict.fromkeys(ref.card.heads))
            base = f"not scored: without the adapter its head ({heads}) is random"
        else:
            base = "evaluated for comparison, with the adapter disabled"
        dropped = f"; {rows.dropped:,} dropped, beyond the max length" if rows.dropped else ""
        yield Choice("task", trained.task.name)
        yield Choice("base", ref.base, base)
        if ref.quantization["kind"] != "none":
            yield Choice("quantization", format_quantization(ref.quantization))
        yield Choice("rows", f"{rows.source}, {rows.split}", f"{len(rows.rows):,} rows{dropped}")
        yield Choice("columns", rows.note or rows.columns, "by --map" if config.columns else "")
        yield from (Choice("note", note) for note in rows.table.notes)
        yield from trained.objective.describe_validation(rows.rows, ref.card.options)
        yield Choice("dtype", trained.dtype, get_dtype_source(ref, config.dtype))
        yield from self.hooks.choices

    def list_warnings(self, trained: LoadedModel) -> Iterator[str]:
        config, rows = self.config, self.rows
        changed = rows.changed if self.primary.run is not None else ""
        if rows.is_training:
            yield f"these are {rows.split}; their metrics say little about new rows."
        if changed == "train":
            dataset = config.dataset or self.run_config.data.dataset
            yield f"{dataset} changed after training; these rows may include training rows."
        elif changed and not (config.corpus or config.max_eval_samples):
            yield (
                "the validation rows or the corpus changed after training, and so did their "
                "metrics."
            )
        yield from describe_dropped(rows.table)
        if rows.dropped:
            dropped = "1 row is" if rows.dropped == 1 else f"{rows.dropped:,} rows are"
            yield (
                f"{dropped} too long and not scored; the numbers are of the other "
                f"{len(rows.rows):,}."
            )
        yield from config.unused_decoding(self._why_decoding_is_unused(trained))

    def _why_decoding_is_unused(self, trained: LoadedModel) -> str:
        """Returns why settings of text generation have no effect; "" if they have one."""
        if trained.objective.samples:
            return "completions are sampled as in training"
        if should_generate(self.run_config.train.predict_with_generate, trained.task):
            return ""
        if trained.task.generates_text:
            return "no text is generated without --max-generate-samples N"
        return f"--task {trained.task.name} generates no text"

    def score(self, trained: LoadedModel, listener: Listener) -> Score:
        if self.hooks.stage:
            listener.stage(self.hooks.stage)
        self.evaluator = self._create_evaluator(trained)
        listener.stage("evaluating")
        self.record = ExampleRecord(trained.objective)
        return self._score(self.evaluator, trained, self.record)

    def score_base(self, model: LoadedModel, _: Listener) -> Score:
        self.base_record = ExampleRecord(self.record.objective)
        return self._score(self.evaluator.with_model(model), model, self.base_record)

    def score_other(self, model: LoadedModel, _: Listener) -> Score:
        evaluator = self.evaluator.for_other(model, partial(self.encode, model.ref))
        return self._score(evaluator, model, ExampleRecord(evaluator.objective))

    def _score(self, evaluator: Evaluator, model: LoadedModel, record: ExampleRecord) -> Score:
        def resample(count: int, seed: int) -> Mapping[str, np.ndarray]:
            if len(record.units) < 2:
                raise InputError(
                    "an interval needs two examples. Score more rows, or pass --resamples 0."
                )
            draws = record.resample(count, seed, evaluator.score_texts, evaluator.language)
            return select_metrics(draws, evaluator.metrics)

        return Score(evaluator(model.model, record), resample, record.units.keys())

    def list_results(self, trained: LoadedModel, metrics: Mapping[str, float]) -> Iterator[str]:
        yield from trained.objective.get_warnings(metrics)
        yield from self.evaluator.get_warnings()

    def compute_outputs(self, trained: LoadedModel) -> tuple[Any, Any]:
        config, rows = self.config, self.record.sampled or self.evaluator.rows
        inputs = build_comparison_inputs(config.eval_text, config.eval_tokens, trained, rows)
        return inputs, inputs.outputs_of(trained)

    def describe(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "name": rows.source,
            "split": rows.split,
            "training_rows": rows.is_training,
            "examples": len(self.record.units),
            "rows": len(rows.rows),
            "dropped": rows.dropped,
            "generated_rows": self.evaluator.generated_rows,
        }

    def iterate_predictions(self, trained: LoadedModel) -> Iterator[Mapping[str, Any]]:
        table, labels = self.rows.table, trained.ref.labels
        base, evaluator = self.base_record, self.evaluator
        lines = iterate_results(self.record, labels, table.where, base=base, evaluator=evaluator)
        if str(self.config.predictions).lower().endswith(".conll"):  # its words are in the rows
            return ({**table.rows[line["row"]], **line} for line in lines)
        return lines

    def _create_evaluator(self, trained: LoadedModel) -> Evaluator:
        config, rows = self.config, self.rows
        train, speed, task = self.run_config.train, self.run_config.speed, trained.task
        generation = get_generation_settings(train, task, len(rows.rows))
        if trained.objective.samples:
            generation["generated_rows"] = min(train.max_generate_samples, len(rows.rows))
        seed = train.order_seed
        if "seed" in config.model_fields_set:  # else as in training
            seed = config.seed
            generation["writing"] = replace(generation["writing"], seed=seed)
        settings: dict[str, Any] = {
            "rows": rows.rows,
            "tokenizer": trained.tokenizer,
            "kind": trained.kind,
            "objective": trained.objective,
            "device": trained.device,
            "dtype": trained.dtype,
            "batch_size": eval_batch_size(train),
            "language": rows.language,
            "chunked_cross_entropy": speed.fast and speed.chunked_cross_entropy,
            "metrics": train.metrics,
            "corpus": rows.corpus,
            **generation,
        }
        return self.hooks.create_evaluator(trained, rows, seed, settings)


def _resolve(config: EvaluateConfig, device: str) -> tuple[ModelRef, ModelRef | None]:
    """Returns `ModelRef`s: of the model, quantized as requested, and of `--against`, or None."""
    kwargs: Any = {"device": device, "dtype": config.dtype}
    name, task, base = config.name, config.task, config.base_model
    if config.against is None:
        ref, other = resolve_model(name, task, base, **kwargs), None
    else:
        ref, other = resolve_pair(name, config.against, task, base, **kwargs)
        other = other.with_labels(config.labels if are_default_names(other.labels) else ())
    return _set_quantization(ref.with_labels(config.labels), config.quant), other


def _set_quantization(ref: ModelRef, quant: str | None) -> ModelRef:
    """Returns `ref` with quantization `quant`; adds a note to it if training used another one."""
    if quant is None or quant == ref.quantization["kind"]:
        return ref
    trained_quantization = format_quantization(ref.quantization)
    if ref.is_prequantized:
        raise InputError(
            f"--quant {quant}: {ref.source.label} is stored quantized ({trained_quantization}), "
            "and is scored as it is stored. Drop --quant, or name the original model."
        )
    requested = QuantConfig(kind=quant)
    if ref.directory is not None:
        message = f"the base is {requested.form}; in training it was {trained_quantization}"
        ref = replace(ref, notes=[*ref.notes, message])
    return ref.with_card(quantization=requested.model_dump())


def _get_run_config(config: EvaluateConfig, ref: ModelRef) -> tuple[TrainConfig, bool]:
    """Returns the configuration for reading rows, and whether these are the training run's rows."""
    update: dict[str, Any] = {}
    run_config = ref.run_config
    if ref.run is not None:
        training_name: str | None = run_config.data.dataset
        if config.dataset is None:
            check_paths(ref.run, run_config.model_dump(mode="json"), DATA_PATHS)
    else:
        training_name = ref.card.data.get("name")
        update["max_length"] = ref.card.max_length or "auto"
        if config.dataset is None:
            if training_name is None:
                raise ConfigError(f"{config.name} does not record its dataset. Add --dataset FILE.")
            update["dataset"] = training_name
    is_own = config.dataset is None or _is_same_name(config.dataset, str(training_name))
    if config.dataset is None:
        if STDIN in (training_name, *run_config.data.also):
            raise ConfigError(
                f"{config.name} was trained on rows that came through stdin and are no longer "
                "available. Name rows with --dataset FILE."
            )
    elif _is_moved(config.dataset, run_config, ref):
        update["dataset"], is_own = config.dataset, True
    else:
        update |= {
            "dataset": config.dataset,
            "also": (),
            "mix": None,
            "validation_file": None,
            "qrels": None,
            "corpus": None,
            "subset": config.subset,
            "input_format": config.input_format,
            "split": None,
            "validation_split": None,
            "max_samples": None,
            "max_eval_samples": None,
        }
    for name in ("corpus", "columns", "ignore_columns", "max_eval_samples", "on_bad_row"):
        if (value := getattr(config, name)) not in (None, {}, ()):
            update[name] = value
    data = run_config.data.model_copy(update=update)
    train = run_config.train.model_copy(update=_get_train_settings(config, run_config.train))
    return run_config.model_copy(update={"data": data, "train": train}), is_own


def _get_train_settings(config: EvaluateConfig, train: TrainerConfig) -> dict[str, Any]:
    """Returns the fields of `train` that `config` sets."""
    values = {
        "metrics": config.metrics,
        "per_device_eval_batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "max_generate_samples": config.max_generate_samples,
        "predict_with_generate": config.max_generate_samples is not None,
    }
    return {name: value for name, value in values.items() if value} | config.decoding(train)


def _is_same_name(dataset: str, name: str) -> bool:
    if isinstance(dataset, InMemoryDataset):
        return False
    return dataset == name or Path(dataset).absolute() == Path(name).absolute()


def _is_moved(dataset: str, run_config: TrainConfig, ref: ModelRef) -> bool:
    """Returns whether `dataset` has the rows of the run's own file, which was moved there."""
    data = run_config.data
    if ref.run is None or data.also or Path(data.dataset).exists():
        return False
    try:
        data_config = data.model_copy(update={"dataset": dataset})
        splits = read_splits(data_config, TASKS[ref.task], run_config.train.seed)
    except InputError:
        return False
    return rows_fingerprint(splits.train.rows) == ref.card.data.get("fingerprint")


def _compute_intervals(
    draws: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray] | None
) -> dict[str, Any]:
    intervals = {"intervals": {name: interval(values) for name, values in draws.items()}}
    if base is not None:
        both = [name for name in draws if name in base]
        intervals["base_intervals"] = {name: interval(base[name]) for name in both}
        intervals["difference_intervals"] = {
            name: interval(np.subtract(draws[name], base[name])) for name in both
        }
    return intervals


def _paired_intervals(
    draws: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns 95 % intervals of the metrics in `other`, and of differences `draws` - `other`."""
    found = _compute_intervals(draws, other)
    return {
        "intervals": found["base_intervals"],
        "difference_intervals": found["difference_intervals"],
    }
