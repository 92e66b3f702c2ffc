"""End of a run: final evaluation, saved files, summary and timings."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import create_readme, generate_command
from ftlevel.artifacts.checkpoints import delete_unreachable_best
from ftlevel.artifacts.files import flush, flush_all
from ftlevel.artifacts.hub import push
from ftlevel.artifacts.places import relative_path
from ftlevel.artifacts.run_directory import RunDirectory, delete_adapter, record_files
from ftlevel.config import IN_MEMORY, MethodConfig, OutputConfig
from ftlevel.data.prepare.streaming import StreamedRows
from ftlevel.errors import RunError
from ftlevel.evaluation.intervals import ExampleRecord, interval, select_metrics
from ftlevel.evaluation.scoring import KEPT, Evaluator, iterate_results
from ftlevel.events import Listener
from ftlevel.extensions import hooks
from ftlevel.methods import needs_import
from ftlevel.models.kinds import save_legacy_rope
from ftlevel.models.quantization import get_quantization_config
from ftlevel.objectives import PolicyObjective
from ftlevel.trained.adapt import finalize_method, save_adapter
from ftlevel.training.best import PredictionRecorder
from ftlevel.training.callbacks import Report
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.resume import has_evaluation
from ftlevel.training.rl.checks import find_rollout_warnings
from ftlevel.training.saving import explain_disk_errors
from ftlevel.training.summary import (
    Outcome,
    build_card,
    build_summary,
    find_nothing_learned,
    find_worse_than_before,
    with_stream_counts,
)
from ftlevel.training.trainer import FtlevelTrainer

_DRAWS = 200  # bootstrap resamples of the validation rows


def end_training(trainer: FtlevelTrainer, run: Run, records: Sequence[Mapping[str, Any]]) -> Run:
    """Free the fast step and optimizer state of `trainer` (modified), and evaluate the final model.

    The evaluation is skipped if `records` has one at the last step. Returns the run, with the
    actual row counts if its dataset was streamed.
    """
    if trainer.fast:
        trainer.fast.remove()
    trainer.forget_optimizer()
    if isinstance(trainer.train_dataset, StreamedRows):
        run = with_stream_counts(run, trainer.train_dataset)
    last = trainer.state.global_step
    if trainer.evaluator and not has_evaluation(records, last):
        trainer.evaluate()
    return run


def save(
    adapted: PreparedModel,
    run: Run,
    directory: RunDirectory,
    base: Mapping[str, Any],
    start: Any = None,
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter or full model, its tokenizer and card, atomically.

    Removes training-only parts of `adapted` (modified). `start` is a temporary directory with the
    reference of preference training. `weights` is the gathered state dict of a sharded model.
    """
    model, partial = adapted.model, directory.adapter.with_name(".adapter.partial")
    finalize_method(model, run.config.method)
    if partial.exists():
        shutil.rmtree(partial)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base["name"]
        save_adapter(model, run.config.method, partial, adapted.start)
    else:
        model.save_pretrained(str(partial), state_dict=weights)
        save_legacy_rope(partial)
    write_tokenizer_and_card(partial, run, base, start, directory.adapter)
    flush_all(partial)
    delete_adapter(directory.path)
    partial.rename(directory.adapter)
    flush(directory.path)
    delete_unreachable_best(directory.checkpoints)


def write_tokenizer_and_card(
    directory: Path,
    run: Run,
    base: Mapping[str, Any],
    start: Any = None,
    final_directory: Path | None = None,
) -> None:
    """Write tokenizer, card and reference files next to the weights in `directory`.

    `start` is a temporary directory with the files of the reference, or None. A local base path is
    stored relative to `final_directory`, to which `directory` is moved later.
    """
    if start is not None:
        shutil.copytree(start.name, directory / KEPT, dirs_exist_ok=True)
    run.model.tokenizer.save_pretrained(str(directory))
    is_local = base["kind"] in ("directory", "gguf")
    path = relative_path(Path(base["name"]), final_directory or directory) if is_local else ""
    card = build_card(run, {**base, "path": path} if path else base)
    card.write(directory)
    run.task.write_files(directory, run.model.config, card.options)


def next_commands(run: Run, directory: RunDirectory) -> list[str]:
    """Returns up to three ftlevel commands to suggest after the run."""
    path, data = quote(str(directory.path)), str(run.data.info["name"])
    generate = generate_command(str(directory.path), run.task.name)
    commands = [generate if data == IN_MEMORY else f"ftlevel evaluate {path}"]
    predict = f"ftlevel predict {path} --dataset"
    commands.append(
        f"{predict} {quote(data)} --limit 5" if Path(data).is_file() else f"{predict} FILE"
    )
    if _is_mergeable(run, directory):
        return [*commands, f"ftlevel merge {path} --out {quote(str(directory.path) + '-merged')}"]
    return commands if generate in commands else [*commands, generate]


def _is_mergeable(run: Run, directory: RunDirectory) -> bool:
    from ftlevel.methods.merging import get_merge_error, load_peft_config  # imports PEFT tuners

    if run.model.source.kind != "gguf" and get_quantization_config(run.model.config) is not None:
        return False
    is_adapter = (directory.adapter / "adapter_config.json").is_file()
    return is_adapter and get_merge_error(load_peft_config(directory.adapter)) is None


def describe_answers(
    run: Run, evaluator: Evaluator | None, answers: PredictionRecorder, step: int
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Returns predictions per validation row at `step`, and 95 % intervals of the metrics.

    Metrics of generated text get intervals only from `ftlevel evaluate`.
    """
    record = answers.of(step)
    if record is None or evaluator is None:
        return [], {}
    initial = answers.of(0) if step else None
    labels = run.data.info["labels"] or ()
    lines = iterate_results(
        record, labels, lambda row: f"row {row + 1:,}", base=initial, evaluator=evaluator
    )
    return list(lines), _intervals(record, evaluator)


def _intervals(record: ExampleRecord, evaluator: Evaluator) -> dict[str, list[float]]:
    draws = record.resample(_DRAWS, 0, None, "") if len(record.units) > 1 else {}
    selected = select_metrics(draws, evaluator.metrics)
    return {name: interval(selected[name]) for name in sorted(selected)}


def _describe_initial(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Returns 95 % intervals of an RL run's metrics before training; empty for other runs."""
    record = outcome.answers.of(0)
    if (
        record is None
        or outcome.evaluator is None
        or not isinstance(run.objective, PolicyObjective)
    ):
        return {}
    return {"intervals_before": _intervals(record, outcome.evaluator)}


def write_results(
    directory: RunDirectory,
    method: MethodConfig,
    summary: Mapping[str, Any],
    lines: Sequence[dict[str, Any]] = (),
) -> None:
    """Write predictions and model cards, then summary.json, which marks the run as finished."""
    directory.save_predictions(lines)
    for finish_run in hooks("finish_run"):
        finish_run(directory, summary, lines)
    directory.save_readme(create_readme(summary, needs_import(method)))
    shutil.copyfile(directory.path / "README.md", directory.adapter / "README.md")
    directory.save_summary(summary)  # marks the run as finished
    record_files(directory.path)


def report_results(
    run: Run,
    outcome: Outcome,
    directory: RunDirectory,
    listener: Listener,
    auxiliary_facts: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Write and show the results of a run, and upload it if configured; returns the summary."""
    summary = build_summary(run, outcome)
    step = outcome.selected.step if outcome.selected else summary["steps"]
    lines, intervals = describe_answers(run, outcome.evaluator, outcome.answers, step)
    summary = {
        **summary,
        "intervals": intervals,
        **_describe_initial(run, outcome),
        **auxiliary_facts,
        "next": next_commands(run, directory),
    }
    with explain_disk_errors(directory):
        write_results(directory, run.config.method, summary, lines)
    warnings = run.objective.get_warnings(summary["metrics"], summary["metrics_before"])
    warnings += find_rollout_warnings(outcome.records)
    for warning in [
        *find_nothing_learned(summary, run),
        *find_worse_than_before(summary),
        *warnings,
    ]:
        listener.warn(warning)
    end_run(run.config.output, directory, summary, listener)
    return summary


def end_run(
    output: OutputConfig, directory: RunDirectory, summary: Mapping[str, Any], listener: Listener
) -> None:
    """Upload the run if configured, then report that it has ended.

    Raises:
        RunError: the upload failed; raised after the report, because the run itself is complete.
    """
    failed: RunError | None = None
    if output.push_to_hub is not None:
        listener.stage("uploading")
        try:
            url = push(directory.adapter, output.push_to_hub, private=output.hub_private)
        except RunError as error:
            failed = error
        else:
            summary = {**summary, "hub": url}
            directory.save_summary(summary)
    listener.end(summary)
    if failed is not None:
        raise failed


@dataclass(frozen=True)
class StartTime:
    """Time at which the user started the run, and CPU seconds of all threads up to that time."""

    at: float
    cpu_s: float

    @classmethod
    def now(cls) -> StartTime:
        """Returns the current time: the start of a run called from Python."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def of_process(cls) -> StartTime:
        """Returns the creation time of the process: the start of a run from the command line."""
        import psutil

        ago = time.time() - psutil.Process().create_time()
        return cls(time.perf_counter() - ago, 0.0)


def measure_times(
    report: Report, start: StartTime, trained_at: float, tokens: int
) -> dict[str, float]:
    """Returns seconds until the first step, in training and in total; and tokens per second."""
    first = report.first_step_at or trained_at
    return {
        "to_first_step_s": round(first - start.at, 3),
        "to_first_step_cpu_s": round(report.first_step_cpu_s - start.cpu_s, 3),
        "train_s": round(report.train_s, 3),
        "total_s": round(time.perf_counter() - start.at, 3),
        "tokens_per_s": round(tokens / report.train_s, 1) if report.train_s else 0.0,
    }
