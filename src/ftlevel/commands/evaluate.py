"""`evaluate`: score a model and the base on held-out rows, with bootstrap intervals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import check_new_output, rows_fingerprint
from ftlevel.artifacts.paths import DATA_PATHS, check_paths
from ftlevel.artifacts.row_files import row_file_type, save_rows
from ftlevel.config import SPECS, EvaluateConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.section import Choice, check_config
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.encoder import EncodingContext
from ftlevel.data.prepare.inference import EvaluationRows, load_evaluation_rows
from ftlevel.data.prepare.loading import read_splits
from ftlevel.data.sources.beir import load_retrieval_set
from ftlevel.data.sources.lines import STDIN
from ftlevel.data.sources.table import describe_dropped
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.embeddings import evaluate_retrieval
from ftlevel.evaluation.intervals import (
    ExampleRecord,
    check_metrics,
    interval,
    select_metrics,
    should_generate,
    uses_text_metrics,
)
from ftlevel.evaluation.scoring import Evaluator, iterate_results, needs_reference, with_reference
from ftlevel.evaluation.two_models import (
    build_comparison_inputs,
    have_same_inputs,
    resolve_pair,
    select_primary,
)
from ftlevel.events import Listener, NullListener
from ftlevel.methods import METHODS
from ftlevel.models.hardware import select_device
from ftlevel.models.loading import silence_loggers
from ftlevel.models.quantization import format_quantization
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.trained.generation import GenerationOptions
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.trained.resolve import get_dtype_source, get_original_base, resolve_model
from ftlevel.training.build_trainer import eval_batch_size
from ftlevel.training.hooks import EvaluationHooks, hooks_of
from ftlevel.training.plan.schedule import text_positions

_NOT_WITH_QRELS = """
    dataset predictions input_format subset split on_bad_row columns ignore_columns metrics
    max_eval_samples max_generate_samples max_new_tokens num_beams temperature top_p eval_text
""".split()


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model and of its base; `draws`: metric → value on each bootstrap resample."""

    metrics: Mapping[str, float]
    base: Mapping[str, float]
    summary: Mapping[str, Any]
    draws: Mapping[str, np.ndarray]


def evaluate(config: EvaluateConfig, *, listener: Listener | None = None) -> Evaluation:
    """Score a run, an adapter or a model with the metrics of its task.

    On the validation split of training, the metrics equal those of training.

    Raises:
        ConfigError: the predictions file exists, or `--task` is missing or wrong.
        InputError: the model or the rows cannot be read.
    """
    check_config(config, EvaluateConfig)
    listener = listener or NullListener()
    if config.qrels is not None:
        return _evaluate_retrieval(config, config.qrels, listener)
    if config.predictions is not None:
        row_file_type("--predictions", config.predictions)
        check_new_output("--predictions", config.predictions)
    with silence_loggers():
        device = select_device(config.device)
        ref, other = _resolve(config, device.value)
        config_ref = select_primary(ref, other)
        run_config, is_own = _get_run_config(config, config_ref)
        ref.check_head()
        listener.stage("reading the data")

        def encode(model: ModelRef) -> EvaluationRows:
            return load_evaluation_rows(
                run_config.data,
                config_ref.card,
                config.split,
                _context(config, model, config_ref, run_config, is_compared=other is not None),
                is_own=is_own,
                is_typed=bool(config.columns),
            )

        eval_rows = encode(ref)
        ref = _with_options(ref, eval_rows.options)
        _check_metrics(config, ref, run_config)
        config.check_task(ref.task)
        options = {"name": config.name, **config.added_options}
        own = hooks_of(ref.configured_task).evaluation(ref, options)
        listener.stage("loading the model")
        trained = ref.load(device.value)
        choices = [*_choices(config, trained, eval_rows, device), *(own.choices if own else ())]
        listener.choices("evaluate", choices)
        unused = config.unused_decoding(_why_decoding_is_unused(config, trained, run_config))
        for warning in [*trained.notes, *_find_warnings(config, eval_rows, config_ref), *unused]:
            listener.warn(warning)
        evaluator = _evaluator(config, trained, eval_rows, run_config, own)
        if needs_reference(evaluator):
            listener.stage("running the reference model")
            evaluator = with_reference(evaluator, trained)
        listener.stage("evaluating")
        record = ExampleRecord(trained.objective)
        metrics = evaluator(trained.model, record)
        base, base_record = _evaluate_base(config, trained, evaluator, listener)
        for warning in [*trained.objective.get_warnings(metrics), *evaluator.get_warnings()]:
            listener.warn(warning)
        against, other_record = {}, None
        if other is not None:
            listener.stage(f"evaluating {config.name} and {config.against} on the same rows")
            inputs = build_comparison_inputs(
                config.eval_text, config.eval_tokens, trained, record.sampled or evaluator.rows
            )
            outputs = inputs.outputs_of(trained)
            trained = replace(trained, model=None)  # frees memory for the other model
            reference = _load_other(config, other, device.value, listener)
            metrics_of_other, other_record = _evaluate_other(evaluator, reference, encode)
            against = {"name": config.against, "metrics": metrics_of_other}
            if have_same_inputs(ref, other):
                against |= inputs.compare(inputs.outputs_of(reference), outputs)
        if config.resamples:
            listener.stage("computing confidence intervals")
        draws, intervals = _intervals(config, evaluator, record, base_record)
        if draws and other_record is not None and other_record.units.keys() == record.units.keys():
            other_draws = other_record.resample(config.resamples, config.seed, None, "")
            against |= _paired_intervals(draws, other_draws)
    summary = {
        "name": config.name,
        "task": trained.task.name,
        "headline": trained.objective.headline,
        "data": {
            "name": eval_rows.source,
            "split": eval_rows.split,
            "training_rows": eval_rows.is_training,
            "examples": len(record.units),
            "rows": len(eval_rows.rows),
            "dropped": eval_rows.dropped,
            "generated_rows": evaluator.generated_rows,
        },
        "base_model": ref.base,
        "quantization": ref.quantization,
        "dtype": trained.dtype,
        "metrics": metrics,
        "base": base,
        **({"against": against} if against else {}),
        **intervals,
    }
    if config.predictions is not None:
        lines = iterate_results(
            record, trained.ref.labels, eval_rows.table.where, base=base_record, evaluator=evaluator
        )
        save_rows(config.predictions, list(lines))
    return Evaluation(metrics, base, summary, draws)


def _with_options(ref: ModelRef, options: Mapping[str, Any]) -> ModelRef:
    return ref if options == ref.card.options else ref.with_card(options=options)


def _check_metrics(config: EvaluateConfig, ref: ModelRef, run_config: TrainConfig) -> None:
    metrics, task = config.metrics or run_config.train.metrics, ref.configured_task
    generates = _generates(config, task, run_config)
    check_metrics(metrics, task, ref.objective, generates=generates, how="--max-generate-samples N")


def _load_other(
    config: EvaluateConfig, other: ModelRef, device: str, listener: Listener
) -> LoadedModel:
    loaded = other.load(device)
    for note in loaded.notes:
        listener.warn(f"{config.against}: {note}")
    return loaded


def _find_warnings(
    config: EvaluateConfig, eval_rows: EvaluationRows, ref: ModelRef
) -> Iterator[str]:
    changed = eval_rows.changed if ref.run is not None else ""
    if eval_rows.is_training:
        yield f"these are {eval_rows.split}; their metrics say little about new rows."
    if changed == "train":
        yield f"{eval_rows.source} changed after training; these rows may include training rows."
    elif changed and not (config.corpus or config.max_eval_samples):
        yield "the validation rows or the corpus changed after training, and so did their metrics."
    yield from describe_dropped(eval_rows.table)
    if eval_rows.dropped:
        dropped = "1 row is" if eval_rows.dropped == 1 else f"{eval_rows.dropped:,} rows are"
        yield (
            f"{dropped} too long and not scored; the numbers are of the other "
            f"{len(eval_rows.rows):,}."
        )


def _evaluate_base(
    config: EvaluateConfig, trained: LoadedModel, evaluator: Evaluator, listener: Listener
) -> tuple[dict[str, float], ExampleRecord | None]:
    with _base_of(trained, config, listener) as base:
        if base is None:
            return {}, None
        record = ExampleRecord(trained.objective)
        return evaluator.with_model(base)(base.model, record), record


def _evaluate_other(
    evaluator: Evaluator, other: LoadedModel, encode: Callable[[ModelRef], EvaluationRows]
) -> tuple[dict[str, float], ExampleRecord]:
    """Returns metrics and per-row results of `other`; `encode` encodes embedding models' rows."""
    evaluator = evaluator.with_model(other)
    if not evaluator.objective.samples:
        evaluator = replace(evaluator, generated_rows=0)
    objective = evaluator.objective
    embedding_format = other.task.embedding_format(other.ref.options)
    if embedding_format is not None and isinstance(objective, Embeddings):
        encoded, objective = encode(other.ref), replace(objective, format=embedding_format)
        rows = {"rows": encoded.rows, "corpus": encoded.corpus, "tokenizer": other.tokenizer}
        evaluator = replace(evaluator, objective=objective, **rows)
    record = ExampleRecord(objective)
    return evaluator(other.model, record), record


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


def _evaluate_retrieval(config: EvaluateConfig, qrels: Path, listener: Listener) -> Evaluation:
    if names := [name for name in _NOT_WITH_QRELS if getattr(config, name) not in (None, {}, ())]:
        flag = "--map" if names[0] == "columns" else f"--{names[0].replace('_', '-')}"
        raise ConfigError(f"{flag} cannot be used with --qrels. Drop one of them.")
    with silence_loggers():
        device = select_device(config.device)
        listener.stage("reading the retrieval dataset")
        data = load_retrieval_set(qrels, config.corpus)
        ref, other = _resolve(config, device.value)
        if ref.task != "embedding":
            raise ConfigError(
                f"--qrels: {config.name} is of --task {ref.task}, and a search needs an "
                "embedding model. Name one, or add --task embedding."
            )
        sizes = f"{len(data.queries):,} queries, {len(data.documents):,} documents"
        listener.choices(
            "evaluate",
            [
                Choice("task", ref.task),
                Choice("base", ref.base),
                Choice("retrieval set", str(qrels), sizes),
                Choice("dtype", ref.card.dtype, get_dtype_source(ref, config.dtype)),
                device,
            ],
        )
        if data.merged:
            listener.warn(
                f"{data.merged:,} documents repeat the text of another document and are counted "
                f"once."
            )
        if data.unjudged:
            listener.warn(f"{data.unjudged:,} queries without a relevant document are skipped.")
        listener.stage("loading the model")
        trained = ref.load(device.value)
        for note in trained.notes:
            listener.warn(note)
        listener.stage("embedding and searching")
        scores, cut = evaluate_retrieval(trained, data, config.batch_size, listener.answered)
        if cut:
            listener.warn(f"{cut:,} texts exceed the maximum length and are truncated.")
        base = None
        with _base_of(trained, config, listener) as original:
            if original is not None:
                base, _ = evaluate_retrieval(original, data, config.batch_size, listener.answered)
        against, other_scores = {}, None
        if other is not None:
            listener.stage(f"evaluating {config.against}")
            reference = _load_other(config, other, device.value, listener)
            other_scores, _ = evaluate_retrieval(
                reference, data, config.batch_size, listener.answered
            )
            against = {"name": config.against, "metrics": other_scores.means}
    draws: dict[str, np.ndarray] = {}
    intervals: dict[str, Any] = {}
    if config.resamples:
        resampling = config.resamples, config.seed
        draws = scores.resample(*resampling)
        intervals = _compute_intervals(draws, base.resample(*resampling) if base else None)
        if other_scores is not None:
            against |= _paired_intervals(draws, other_scores.resample(*resampling))
    summary = {
        "name": config.name,
        "task": ref.task,
        "headline": "ndcg@10",
        "data": {
            "name": str(qrels),
            "split": f"{len(data.documents):,} documents",
            "examples": len(data.queries),
            "merged": data.merged,
            "unjudged": data.unjudged,
        },
        "base_model": ref.base,
        "dtype": trained.dtype,
        "metrics": scores.means,
        "base": base.means if base is not None else {},
        **({"against": against} if against else {}),
        "resamples": config.resamples,
        **intervals,
    }
    return Evaluation(scores.means, summary["base"], summary, draws)


def _resolve(config: EvaluateConfig, device: str) -> tuple[ModelRef, ModelRef | None]:
    """Returns `ModelRef`s: of the model, quantized as requested, and of `--against`, or None."""
    kwargs: Any = {"device": device, "dtype": config.dtype}
    name, task, base = config.name, config.task, config.base_model
    if config.against is None:
        return _set_quantization(resolve_model(name, task, base, **kwargs), config.quant), None
    ref, other = resolve_pair(name, config.against, task, base, **kwargs)
    return _set_quantization(ref, config.quant), other


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
    return run_config.model_copy(update={"data": run_config.data.model_copy(update=update)}), is_own


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


def _context(
    config: EvaluateConfig,
    ref: ModelRef,
    config_ref: ModelRef,
    run_config: TrainConfig,
    *,
    is_compared: bool,
) -> EncodingContext:
    tokenizer, task, kind = ref.tokenizer, ref.configured_task, ref.model_kind
    positions = text_positions(run_config.method, ref.model_config)
    name = config_ref.card.method
    has_virtual_tokens = (
        config_ref.run is None and name in METHODS and METHODS[name].positions(SPECS[name]())
    )
    if has_virtual_tokens or is_compared:  # these or the other model limit the text
        positions = config_ref.card.max_length or positions
    elif positions and kind == "decoder" and _generates(config, task, run_config):
        new = config.max_new_tokens or run_config.train.max_new_tokens
        positions = max(config_ref.card.max_length, positions - new)
    bounds, seed = LengthBounds(positions), run_config.train.seed
    return EncodingContext(task, kind, tokenizer, len(tokenizer), bounds, seed)


def _why_decoding_is_unused(
    config: EvaluateConfig, trained: LoadedModel, run_config: TrainConfig
) -> str:
    """Returns why settings of text generation have no effect; "" if they have one."""
    if trained.objective.samples:
        return "completions are sampled as in training"
    if _generates(config, trained.task, run_config):
        return ""
    if trained.task.generates_text:
        return "no text is generated without --max-generate-samples N"
    return f"--task {trained.task.name} generates no text"


def _evaluator(
    config: EvaluateConfig,
    trained: LoadedModel,
    eval_rows: EvaluationRows,
    run_config: TrainConfig,
    own: EvaluationHooks | None,
) -> Evaluator:
    train, speed = run_config.train, run_config.speed
    task, metrics = trained.task, config.metrics or train.metrics
    generates = _generates(config, task, run_config)
    is_seeded = "seed" in config.model_fields_set  # else as in training
    num_rows = 0
    if own is not None or (generates and uses_text_metrics(metrics, task)):
        num_rows = min(
            config.max_generate_samples or train.max_generate_samples, len(eval_rows.rows)
        )
    settings: dict[str, Any] = {
        "rows": eval_rows.rows,
        "tokenizer": trained.tokenizer,
        "kind": trained.kind,
        "objective": trained.objective,
        "device": trained.device,
        "dtype": trained.dtype,
        "batch_size": config.batch_size or eval_batch_size(train),
        "generated_rows": num_rows,
        "writing": GenerationOptions(
            config.max_new_tokens or train.max_new_tokens,
            **config.decoding(train),
            seed=config.seed if is_seeded else train.seed,
        ),
        "score_texts": task.score_texts,
        "language": eval_rows.language,
        "chunked_cross_entropy": speed.fast and speed.chunked_cross_entropy,
        "metrics": metrics,
        "corpus": eval_rows.corpus,
    }
    if own is None:
        return Evaluator(**settings)
    seed = config.seed if is_seeded else train.order_seed
    return own.create_evaluator(trained, eval_rows, seed, settings)


def _generates(config: EvaluateConfig, task: BaseTask, run_config: TrainConfig) -> bool:
    generates = should_generate(run_config.train.predict_with_generate, task)
    return generates or (task.generates_text and config.max_generate_samples is not None)


def _choices(
    config: EvaluateConfig, trained: LoadedModel, eval_rows: EvaluationRows, device: Choice
) -> list[Choice]:
    ref = trained.ref
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
    dropped = f"; {eval_rows.dropped:,} dropped, beyond the max length" if eval_rows.dropped else ""
    quantization = format_quantization(ref.quantization)
    return [
        Choice("task", trained.task.name),
        Choice("base", ref.base, base),
        *([Choice("quantization", quantization)] if ref.quantization["kind"] != "none" else []),
        Choice(
            "rows",
            f"{eval_rows.source}, {eval_rows.split}",
            f"{len(eval_rows.rows):,} rows{dropped}",
        ),
        Choice(
            "columns", eval_rows.note or eval_rows.columns, "by --map" if config.columns else ""
        ),
        *(Choice("note", note) for note in eval_rows.table.notes),
        Choice("dtype", trained.dtype, get_dtype_source(ref, config.dtype)),
        device,
    ]


def _intervals(
    config: EvaluateConfig, evaluator: Evaluator, record: ExampleRecord, base: ExampleRecord | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns metric → bootstrap values, and 95 % intervals of metrics and gains over `base`."""
    if not config.resamples:
        return {}, {}
    if len(record.units) < 2:
        raise InputError("an interval needs two examples. Score more rows, or pass --resamples 0.")
    resampling = (config.resamples, config.seed, evaluator.score_texts, evaluator.language)
    draws = select_metrics(record.resample(*resampling), evaluator.metrics)
    intervals = _compute_intervals(draws, base.resample(*resampling) if base is not None else None)
    return draws, {"resamples": config.resamples, **intervals}


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
