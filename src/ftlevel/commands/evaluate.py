"""`evaluate`: score a model and its base on held-out rows, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import check_absent, rows_fingerprint
from ftlevel.artifacts.places import DATA_PLACES, check_places, read_run
from ftlevel.artifacts.row_files import row_file_type, write_rows
from ftlevel.config import EvaluateConfig, InMemoryDataset, QuantConfig, TrainConfig, build_config
from ftlevel.config.section import Choice
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.encoder import EncodingContext
from ftlevel.data.prepare.inference import EvaluationRows, load_evaluation_rows
from ftlevel.data.prepare.loading import read_splits
from ftlevel.data.sources.lines import STDIN
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.intervals import (
    ExampleRecord,
    check_metrics,
    generates_texts,
    interval,
    select_metrics,
    uses_text_metrics,
)
from ftlevel.evaluation.model_pair import (
    ComparisonInputs,
    ModelOutputs,
    build_comparison_inputs,
    choose_leader,
    resolve_pair,
)
from ftlevel.evaluation.retrieval import evaluate_retrieval
from ftlevel.evaluation.rewards import RewardEvaluator, open_rewards
from ftlevel.evaluation.rollouts import Rollouts
from ftlevel.evaluation.scoring import (
    Evaluator,
    GenerationOptions,
    needs_reference,
    row_lines,
    with_reference,
)
from ftlevel.events import Listener, NullListener
from ftlevel.methods import METHODS
from ftlevel.models.hardware import choose_device
from ftlevel.models.loading import silence_loggers
from ftlevel.models.quantization import quantization_form
from ftlevel.tasks import TASKS
from ftlevel.tasks.embedding.beir import read_retrieval_set
from ftlevel.tasks.rl.objective import PolicyGradient
from ftlevel.trained.load import LoadedModel, load_ref
from ftlevel.trained.model_ref import ModelRef, describe_dtype
from ftlevel.training.build_trainer import eval_batch_size
from ftlevel.training.plan.schedule import text_positions


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation; `base` is empty if the base was not scored.

    `draws` maps each metric to its values over the bootstrap resamples.
    """

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
    listener = listener or NullListener()
    if config.qrels is not None:
        return _evaluate_on_judgments(config, config.qrels, listener)
    if config.predictions is not None:
        row_file_type("--predictions", config.predictions)
        check_absent("--predictions", config.predictions)
    with silence_loggers():
        device = choose_device(config.device)
        found, reference = resolve_pair(config, device.value)
        found = _requantized(found, config)
        leader = choose_leader(found, reference)
        settings, is_own = _settings(config, leader)
        listener.stage("loading the model")
        trained = load_ref(found, device.value)
        listener.stage("reading the data")
        held_out = load_evaluation_rows(
            settings.data,
            leader.card,
            config.split,
            _context(config, trained, leader, reference, settings),
            is_own=is_own,
            is_typed=bool(config.columns),
        )
        listener.choices("evaluate", _choices(config, found, trained, held_out, device))
        for note in trained.notes:
            listener.warn(note)
        if held_out.is_training:
            listener.warn(f"these are {held_out.split}; they say little of other rows.")
        if held_out.dropped:
            lost = "1 row is" if held_out.dropped == 1 else f"{held_out.dropped:,} rows are"
            left = len(held_out.rows)
            listener.warn(f"{lost} too long and not scored; the numbers are of the other {left:,}.")
        evaluator = _evaluator(config, trained, held_out, settings)
        if needs_reference(evaluator):
            listener.stage("running the reference model")
            evaluator = with_reference(evaluator, trained, found)
        listener.stage("evaluating")
        record = ExampleRecord(trained.objective)
        metrics = evaluator(trained.model, record)
        for remark in trained.objective.find_warnings(metrics):
            listener.warn(remark)
        base, base_record = {}, None
        if config.base and _has_comparable_base(found, trained):
            listener.stage("evaluating the base model")
            base_record = ExampleRecord(trained.objective)
            with trained.model.disable_adapter():
                base = evaluator(trained.model, base_record)
        against = None
        if reference is not None:
            listener.stage(f"evaluating {config.name} and {config.against} on the same rows")
            questions = build_comparison_inputs(
                config.eval_text, config.eval_tokens, trained, evaluator.rows
            )
            told = questions.ask(trained)
            trained = replace(trained, model=None)  # frees memory for the other model
            against = _compare_with_reference(config, reference, questions, told, evaluator)
        if config.resamples:
            listener.stage("computing confidence intervals")
        draws, intervals = _intervals(config, evaluator, record, base_record)
    summary = {
        "name": config.name,
        "task": trained.task.name,
        "headline": trained.objective.headline,
        "data": {
            "name": held_out.source,
            "split": held_out.split,
            "training_rows": held_out.is_training,
            "examples": len(record.units),
            "rows": len(held_out.rows),
            "dropped": held_out.dropped,
            "generated_rows": evaluator.generated_rows,
        },
        "base_model": found.source.name,
        "quantization": found.card.quantization,
        "dtype": trained.dtype,
        "metrics": metrics,
        "base": base,
        **({} if against is None else {"against": against}),
        **intervals,
    }
    if config.predictions is not None:
        where, labels = held_out.table.where, trained.labels
        lines = row_lines(record, labels, where, base=base_record, evaluator=evaluator)
        write_rows(config.predictions, list(lines))
    return Evaluation(metrics, base, summary, draws)


def _evaluate_on_judgments(config: EvaluateConfig, qrels: Path, listener: Listener) -> Evaluation:
    """Search the corpus of a retrieval set for its queries, and score what is found."""
    for flag, given in (
        ("--dataset", config.dataset),
        ("--against", config.against),
        ("--predictions", config.predictions),
    ):
        if given is not None:
            raise ConfigError(f"{flag} cannot be used with --qrels. Drop one of them.")
    with silence_loggers():
        device = choose_device(config.device)
        listener.stage("reading the retrieval dataset")
        data = read_retrieval_set(qrels, config.corpus)
        found, _ = resolve_pair(config, device.value)
        found = _requantized(found, config)
        if found.card.task != "embedding":
            raise ConfigError(
                f"--qrels: {config.name} is of --task {found.card.task}, and a search needs an "
                "embedding model. Name one, or add --task embedding."
            )
        sizes = f"{len(data.queries):,} queries, {len(data.documents):,} documents"
        listener.choices(
            "evaluate",
            [
                Choice("task", found.card.task),
                Choice("base", found.source.name),
                Choice("retrieval set", str(qrels), sizes),
                Choice("dtype", found.card.dtype, describe_dtype(found, config.dtype)),
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
        trained = load_ref(found, device.value)
        listener.stage("embedding and searching")
        own, cut = evaluate_retrieval(trained, data, config.batch_size, listener.answered)
        if cut:
            listener.warn(f"{cut:,} texts exceed the maximum length and are truncated.")
        base = None
        if config.base and trained.has_adapter:
            listener.stage("evaluating the base model")
            with trained.model.disable_adapter():
                base, _ = evaluate_retrieval(trained, data, config.batch_size, listener.answered)
    draws = own.resample(config.resamples, config.seed) if config.resamples else {}
    intervals: dict[str, Any] = {}
    if draws:
        intervals["intervals"] = {name: interval(values) for name, values in draws.items()}
    if draws and base is not None:
        other = base.resample(config.resamples, config.seed)
        intervals["base_intervals"] = {name: interval(values) for name, values in other.items()}
        intervals["difference_intervals"] = {
            name: interval(np.subtract(draws[name], other[name])) for name in draws
        }
    summary = {
        "name": config.name,
        "task": found.card.task,
        "headline": "ndcg@10",
        "data": {
            "name": str(qrels),
            "split": f"{len(data.documents):,} documents",
            "examples": len(data.queries),
            "merged": data.merged,
            "unjudged": data.unjudged,
        },
        "base_model": found.source.name,
        "dtype": trained.dtype,
        "metrics": own.means,
        "base": base.means if base is not None else {},
        "resamples": config.resamples,
        **intervals,
    }
    return Evaluation(own.means, summary["base"], summary, draws)


def _compare_with_reference(
    config: EvaluateConfig,
    reference: ModelRef,
    questions: ComparisonInputs,
    told: ModelOutputs,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """Return the metrics of `reference`, and its difference from the outputs `told`."""
    other = load_ref(reference, evaluator.device)
    score = replace(evaluator, generated_rows=0, dtype=other.dtype)
    return {
        "name": config.against,
        "metrics": score(other.model),
        **questions.compare(questions.ask(other), told),
    }


def _requantized(found: ModelRef, config: EvaluateConfig) -> ModelRef:
    """Return `found` with the requested quantization, and a note if it differs from training."""
    own = found.card.quantization
    if config.quant is None or config.quant == own["kind"]:
        return found
    if found.is_stored_quantized:
        raise InputError(
            f"--quant {config.quant}: {found.source.words} is stored quantized "
            f"({quantization_form(own)}), and is scored as it is stored. Drop --quant, or name the "
            "original model."
        )
    wish = QuantConfig(kind=config.quant)
    card = replace(found.card, quantization=wish.model_dump())
    note = f"the base is {wish.form}; in training it was {quantization_form(own)}"
    notes = [note] if found.directory is not None else []
    return replace(found, card=card, notes=[*found.notes, *notes])


def _settings(config: EvaluateConfig, found: ModelRef) -> tuple[TrainConfig, bool]:
    """Return data and scoring settings, and whether the rows are the run's own.

    Options override the run's settings. A file that was moved still counts as the run's own.
    """
    own = TrainConfig(data={"columns": found.card.data.get("columns", {})})
    if found.run is not None:
        own = build_config([read_run(found.run)])
    data = own.data
    if found.run is not None and config.dataset is None:
        check_places(found.run, own.model_dump(mode="json"), DATA_PLACES)
    if found.run is None and config.dataset is None:
        name = found.card.data.get("name")
        if name is None:
            raise ConfigError(f"{config.name} does not record its dataset. Add --dataset FILE.")
        data = data.model_copy(update={"dataset": name})
    if config.dataset is None and STDIN in (data.dataset, *data.also):
        raise ConfigError(
            f"{config.name} was trained on rows that came through stdin and are no longer "
            "available. Name rows with --dataset FILE."
        )
    changes: dict[str, Any] = {"overlong": "drop"}
    if found.run is None:
        changes["max_length"] = found.card.max_length or "auto"
    known = found.card.data.get("name") if found.run is None else own.data.dataset
    is_own = config.dataset is None or _is_same_name(config.dataset, str(known))
    if config.dataset is not None and _is_moved(config.dataset, own, found):
        changes["dataset"], is_own = config.dataset, True
    elif config.dataset is not None:
        changes |= {
            "dataset": config.dataset,
            "also": (),
            "mix": None,
            "validation_file": None,
            "subset": config.subset,
            "input_format": config.input_format,
            "split": None,
            "validation_split": None,
            "max_samples": None,
            "max_eval_samples": None,
        }
    if config.columns:
        changes["columns"] = config.columns
    if config.ignore_columns:
        changes["ignore_columns"] = config.ignore_columns
    if config.max_eval_samples is not None:
        changes["max_eval_samples"] = config.max_eval_samples
    return own.model_copy(update={"data": data.model_copy(update=changes)}), is_own


def _is_same_name(dataset: str, known: str) -> bool:
    """Return whether two names mean the same dataset; rows in memory never match."""
    if isinstance(dataset, InMemoryDataset):
        return False
    return dataset == known or Path(dataset).absolute() == Path(known).absolute()


def _is_moved(dataset: str, own: TrainConfig, found: ModelRef) -> bool:
    """Return whether `dataset` is the run's own file at a new path, by fingerprint."""
    data = own.data
    if found.run is None or data.streaming or data.also or Path(data.dataset).exists():
        return False
    try:
        splits = read_splits(
            data.model_copy(update={"dataset": dataset}), TASKS[found.card.task], own.train.seed
        )
    except InputError:
        return False
    return rows_fingerprint(splits.train.rows) == found.card.data.get("fingerprint")


def _context(
    config: EvaluateConfig,
    trained: LoadedModel,
    found: ModelRef,
    reference: ModelRef | None,
    settings: TrainConfig,
) -> EncodingContext:
    """Return the encoding context for scoring `trained`, with the seed of training."""
    tokenizer, positions = trained.tokenizer, text_positions(settings.method, trained.model.config)
    method = METHODS.get(found.card.method)
    hidden = found.run is None and method is not None and method.positions is not None
    if hidden or reference is not None:  # virtual tokens or the other model limit the text
        positions = found.card.max_length or positions
    elif positions and trained.kind == "decoder" and _generates(config, trained, settings):
        room = config.max_new_tokens or settings.train.max_new_tokens
        positions = max(found.card.max_length, positions - room)
    bounds, seed = LengthBounds(positions), settings.train.seed
    return EncodingContext(trained.task, trained.kind, tokenizer, len(tokenizer), bounds, seed)


def _evaluator(
    config: EvaluateConfig, trained: LoadedModel, held_out: EvaluationRows, settings: TrainConfig
) -> Evaluator:
    train, speed = settings.train, settings.speed
    task, metrics = trained.task, config.metrics or train.metrics
    generates = _generates(config, trained, settings)
    check_metrics(
        metrics, task, trained.objective, generates=generates, how="--max-generate-samples N"
    )
    rows = config.max_generate_samples or train.max_generate_samples
    kind: type[Evaluator] = Evaluator
    more: dict[str, Any] = {}
    if isinstance(trained.objective, PolicyGradient):
        kind, more = RewardEvaluator, {"rollouts": _rollouts(trained, held_out, settings)}
    return kind(
        **more,
        rows=held_out.rows,
        tokenizer=trained.tokenizer,
        kind=trained.kind,
        objective=trained.objective,
        device=trained.device,
        dtype=trained.dtype,
        batch_size=config.batch_size or eval_batch_size(train),
        generated_rows=min(rows, len(held_out.rows))
        if more
        else min(rows, len(held_out.rows))
        if generates and uses_text_metrics(metrics, task)
        else 0,
        writing=GenerationOptions(
            config.max_new_tokens or train.max_new_tokens,
            **config.decoding(train),
            seed=config.seed,
        ),
        score_texts=task.score_texts,
        language=held_out.language,
        chunked_cross_entropy=speed.fast and speed.chunked_cross_entropy,
        metrics=metrics,
    )


def _rollouts(trained: LoadedModel, held_out: EvaluationRows, settings: TrainConfig) -> Rollouts:
    """Return the rollouts of a model of reinforcement learning, with the seed of training."""
    objective = trained.objective
    if not isinstance(objective, PolicyGradient):
        raise TypeError("only a policy has rewards")
    rl = objective.settings
    return Rollouts(
        trained.model,
        trained.tokenizer,
        rl,
        open_rewards(rl, trained.device, trained.tokenizer, held_out.rows, held_out.table.where),
        settings.train.order_seed,
        kind=trained.kind,
        method=trained.method,
        device=trained.device,
        dtype=trained.dtype,
        where=held_out.table.where,
    )


def _generates(config: EvaluateConfig, trained: LoadedModel, settings: TrainConfig) -> bool:
    """Return whether generated text is scored."""
    task = trained.task
    generates = generates_texts(settings.train.predict_with_generate, task)
    return generates or (task.generates_text and config.max_generate_samples is not None)


def _has_comparable_base(found: ModelRef, trained: LoadedModel) -> bool:
    """Return whether the base can do the task: not with a randomly initialized head."""
    return trained.has_adapter and not found.card.heads


def _choices(
    config: EvaluateConfig,
    found: ModelRef,
    trained: LoadedModel,
    held_out: EvaluationRows,
    device: Choice,
) -> list[Choice]:
    quant = found.card.quantization
    if not config.base:
        base = "not scored"
    elif not trained.has_adapter:
        base = "there is no adapter to disable"
    elif found.card.heads:
        heads = ", ".join(dict.fromkeys(found.card.heads))
        base = f"not scored: without the adapter its {heads} is random"
    else:
        base = "evaluated for comparison, with the adapter disabled"
    dropped = f"; {held_out.dropped:,} dropped, beyond the max length" if held_out.dropped else ""
    return [
        Choice("task", trained.task.name),
        Choice("base", found.source.name, base),
        *([Choice("quantization", quantization_form(quant))] if quant["kind"] != "none" else []),
        Choice(
            "rows", f"{held_out.source}, {held_out.split}", f"{len(held_out.rows):,} rows{dropped}"
        ),
        Choice("columns", held_out.note or held_out.columns, "by --map" if config.columns else ""),
        *(Choice("note", note) for note in held_out.table.notes),
        Choice("dtype", trained.dtype, describe_dtype(found, config.dtype)),
        device,
    ]


def _intervals(
    config: EvaluateConfig, evaluator: Evaluator, record: ExampleRecord, base: ExampleRecord | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return resampled metrics and 95 % intervals of metrics and of differences from the base."""
    if not config.resamples:
        return {}, {}
    if len(record.units) < 2:
        raise InputError("one example has no interval. Score more rows, or pass --resamples 0.")
    settings = (config.resamples, config.seed, evaluator.score_texts, evaluator.language)
    tuned = select_metrics(record.resample(*settings), evaluator.metrics)
    found: dict[str, Any] = {
        "resamples": config.resamples,
        "intervals": {name: interval(values) for name, values in tuned.items()},
    }
    if base is not None:
        other = base.resample(*settings)
        both = [name for name in tuned if name in other]
        found["base_intervals"] = {name: interval(other[name]) for name in both}
        found["difference_intervals"] = {
            name: interval(np.subtract(tuned[name], other[name])) for name in both
        }
    return tuned, found
