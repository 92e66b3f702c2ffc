"""End of a run: final evaluation, saved files, summary and timings."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import create_readme, predict_command
from ftlevel.artifacts.checkpoints import delete_unreachable_best
from ftlevel.artifacts.files import flush, flush_all
from ftlevel.artifacts.hub import push
from ftlevel.artifacts.paths import relative_path
from ftlevel.artifacts.run_directory import RunDirectory, delete_adapter, record_files
from ftlevel.config import IN_MEMORY, MethodConfig, OutputConfig
from ftlevel.errors import RunError
from ftlevel.evaluation.intervals import ExampleRecord, interval, select_metrics
from ftlevel.evaluation.scoring import Evaluator, iterate_results
from ftlevel.events import Listener
from ftlevel.extensions import hooks
from ftlevel.methods import needs_import
from ftlevel.models.kinds import save_legacy_rope
from ftlevel.models.quantization import get_quantization_config
from ftlevel.trained.adapt import finalize_method, save_adapter
from ftlevel.trained.generation import save_stop_ids
from ftlevel.training.best import PredictionRecorder
from ftlevel.training.callbacks import Report
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.resume import has_evaluation
from ftlevel.training.saving import explain_disk_errors
from ftlevel.training.summary import (
    Outcome,
    create_card,
    create_summary,
    warn_if_not_learned,
    warn_if_worse,
)
from ftlevel.training.trainer import FtlevelTrainer

_NUM_RESAMPLES = 200  # bootstrap resamples of the validation rows


def end_training(trainer: FtlevelTrainer, records: Sequence[Mapping[str, Any]]) -> None:
    """Free the fast step and optimizer state of `trainer` (modified), and evaluate the final model.

    The evaluation is skipped if `records` has one at the last step.
    """
    if trainer.fast:
        trainer.fast.remove()
    trainer.forget_optimizer()
    if trainer.evaluator and not has_evaluation(records, trainer.state.global_step):
        trainer.evaluate()


def save(
    model: PreparedModel,
    run: Run,
    output_dir: RunDirectory,
    base: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter or full model, its tokenizer and card, atomically.

    Training-only modules of `model` (modified) are removed. `base` describes the base model.
    `weights` is the gathered state dict of a sharded full model.
    """
    module, partial = model.model, output_dir.adapter.with_name(".adapter.partial")
    finalize_method(module, run.config.method, run.model.device, run.model.dtype)
    if partial.exists():
        shutil.rmtree(partial)
    if hasattr(module, "peft_config"):
        module.peft_config["default"].base_model_name_or_path = base["name"]
        save_adapter(module, run.config.method, partial, model.initial_state)
    else:
        module.save_pretrained(str(partial), state_dict=weights)
        save_legacy_rope(partial)
    save_tokenizer_and_card(partial, run, base, output_dir.adapter)
    flush_all(partial)
    delete_adapter(output_dir.path)
    partial.rename(output_dir.adapter)
    flush(output_dir.path)
    delete_unreachable_best(output_dir.checkpoints)


def save_tokenizer_and_card(
    save_dir: Path, run: Run, base: Mapping[str, Any], final_dir: Path | None = None
) -> None:
    """Save tokenizer, card and the task's files next to the weights in `save_dir`.

    A local base path is stored relative to `final_dir`, to which `save_dir` is moved later.
    """
    run.hooks.save_files(run, save_dir)
    run.model.tokenizer.save_pretrained(str(save_dir))
    save_stop_ids(save_dir, run.model.tokenizer)
    is_local = base["kind"] in ("directory", "gguf")
    path = relative_path(Path(base["name"]), final_dir or save_dir) if is_local else ""
    card = create_card(run, {**base, "path": path} if path else base)
    card.write(save_dir)
    run.task.write_files(save_dir, run.model.config, card.options)


def next_commands(run: Run, output_dir: RunDirectory) -> list[str]:
    """Returns up to three ftlevel commands to suggest after the run."""
    path, data = quote(str(output_dir.path)), str(run.data.info["name"])
    use = predict_command(str(output_dir.path), run.task.name)
    commands = [use if data == IN_MEMORY else f"ftlevel evaluate {path}"]
    predict = f"ftlevel predict {path} --dataset"
    has_file = run.task.predicts_training_rows and Path(data).is_file()
    commands.append(f"{predict} {quote(data)} --limit 5" if has_file else f"{predict} FILE")
    merge = f"ftlevel merge {path} --out {quote(str(output_dir.path) + '-merged')}"
    commands.append(merge if _is_mergeable(run, output_dir) else use)
    return list(dict.fromkeys(commands))


def _is_mergeable(run: Run, output_dir: RunDirectory) -> bool:
    from ftlevel.methods.merging import get_merge_error, load_peft_config  # imports PEFT tuners

    if run.model.source.kind != "gguf" and get_quantization_config(run.model.config) is not None:
        return False
    is_adapter = (output_dir.adapter / "adapter_config.json").is_file()
    return is_adapter and get_merge_error(load_peft_config(output_dir.adapter)) is None


def get_predictions(
    run: Run, evaluator: Evaluator | None, recorder: PredictionRecorder, step: int
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Returns the predictions at `step`, one per validation row, and metric → 95 % interval.

    Both are empty if this evaluation was not recorded. Metrics of generated text get no interval.
    """
    record = recorder.of(step)
    if record is None or evaluator is None:
        return [], {}
    initial = recorder.of(0) if step else None
    labels = run.data.info["labels"] or ()
    where = run.data.validation_table.where

    def get_position(row: int) -> str:  # without the directory, which a resumed run writes whole
        return where(row).rpartition("/")[2]

    predictions = iterate_results(record, labels, get_position, base=initial, evaluator=evaluator)
    return list(predictions), _intervals(record, evaluator)


def _intervals(record: ExampleRecord, evaluator: Evaluator) -> dict[str, list[float]]:
    resampled = record.resample(_NUM_RESAMPLES, 0, None, "") if len(record.units) > 1 else {}
    selected = select_metrics(resampled, evaluator.metrics)
    return {name: interval(selected[name]) for name in sorted(selected)}


def _initial_intervals(run: Run, outcome: Outcome) -> dict[str, Any]:
    record, evaluator = outcome.answers.of(0), outcome.evaluator
    if record is None or evaluator is None or not run.objective.samples:
        return {}
    return {"intervals_before": _intervals(record, evaluator)}


def save_results(
    output_dir: RunDirectory,
    method: MethodConfig,
    summary: Mapping[str, Any],
    predictions: Sequence[dict[str, Any]],
) -> None:
    """Save predictions and model cards, then summary.json, which marks the run as finished."""
    output_dir.save_predictions(predictions)
    for finish_run in hooks("finish_run"):
        finish_run(output_dir, summary, predictions)
    output_dir.save_readme(create_readme(summary, needs_import(method)))
    shutil.copyfile(output_dir.path / "README.md", output_dir.adapter / "README.md")
    output_dir.save_summary(summary)  # marks the run as finished
    record_files(output_dir.path)


def report_results(
    run: Run,
    outcome: Outcome,
    output_dir: RunDirectory,
    listener: Listener,
    auxiliary_info: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Save, show and, if set, upload results; returns the summary, with `auxiliary_info` added."""
    summary = create_summary(run, outcome)
    step = outcome.selected.step if outcome.selected else summary["steps"]
    lines, intervals = get_predictions(run, outcome.evaluator, outcome.answers, step)
    summary = {
        **summary,
        "intervals": intervals,
        **_initial_intervals(run, outcome),
        **auxiliary_info,
        "next": next_commands(run, output_dir),
    }
    with explain_disk_errors(output_dir):
        save_results(output_dir, run.config.method, summary, lines)
    if lines and summary["metrics_before"] and outcome.answers.of(0) is None:
        listener.warn(
            "predictions before training are lost by --resume: use evaluate RUN --predictions FILE"
        )
    for warning in [
        *warn_if_not_learned(summary, run),
        *warn_if_worse(summary),
        *run.objective.get_warnings(summary["metrics"], summary["metrics_before"]),
        *run.hooks.get_warnings(run, outcome.records),
    ]:
        listener.warn(warning)
    end_run(run.config.output, output_dir, summary, listener)
    return summary


def end_run(
    output: OutputConfig, output_dir: RunDirectory, summary: Mapping[str, Any], listener: Listener
) -> None:
    """Upload the adapter if configured and report the run's end; raises if the upload failed."""
    upload_error: RunError | None = None
    if output.push_to_hub is not None:
        listener.stage("uploading")
        try:
            url = push(output_dir.adapter, output.push_to_hub, private=output.hub_private)
        except RunError as error:
            upload_error = error
        else:
            summary = {**summary, "hub": url}
            output_dir.save_summary(summary)
    listener.end(summary)
    if upload_error is not None:
        raise upload_error


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

        age = time.time() - psutil.Process().create_time()
        return cls(time.perf_counter() - age, 0.0)


def measure_times(
    report: Report, start: StartTime, trained_at: float, tokens: int
) -> dict[str, float]:
    """Returns seconds (to the first step, in training, in total) and tokens/s, for summary.json.

    Without a first step, `trained_at`, the end of training, takes its place.
    """
    return {
        "to_first_step_s": round((report.first_step_at or trained_at) - start.at, 3),
        "to_first_step_cpu_s": round(report.first_step_cpu_s - start.cpu_s, 3),
        "train_s": round(report.train_s, 3),
        "total_s": round(time.perf_counter() - start.at, 3),
        "tokens_per_s": round(tokens / report.train_s, 1) if report.train_s else 0.0,
    }
