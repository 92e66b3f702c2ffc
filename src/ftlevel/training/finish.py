"""End of a run: final evaluation, saved files, verification, summary and timings."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import create_readme, library_versions, predict_command
from ftlevel.artifacts.checkpoints import delete_unreachable_best
from ftlevel.artifacts.files import flush, flush_all
from ftlevel.artifacts.hub import push
from ftlevel.artifacts.run_directory import RunDirectory, delete_adapter, record_files
from ftlevel.config import IN_MEMORY, MethodConfig, OutputConfig
from ftlevel.errors import RunError
from ftlevel.evaluation.intervals import ExampleRecord, interval, select_metrics
from ftlevel.evaluation.scoring import Evaluator, iterate_results
from ftlevel.events import Listener
from ftlevel.extensions import hooks
from ftlevel.fast.likelihoods import base_model
from ftlevel.methods import needs_import
from ftlevel.models.hardware import peak_memory_bytes, trim_heap
from ftlevel.models.kinds import save_legacy_rope
from ftlevel.models.quantization import get_quantization_config
from ftlevel.trained.adapt import finalize_method, save_adapter
from ftlevel.trained.generation import added_stops
from ftlevel.training.build_trainer import matmul_context
from ftlevel.training.model import get_speed_info
from ftlevel.training.plan.run import Run, count_parameters
from ftlevel.training.proof import Proof, verify_run
from ftlevel.training.resume import has_evaluation
from ftlevel.training.saving import explain_disk_errors
from ftlevel.training.session import TrainingSession
from ftlevel.training.sharding import save_sharded, verify_sharded_run
from ftlevel.training.summary import (
    save_tokenizer_and_card,
    summarize_losses,
    warn_if_not_learned,
    warn_if_worse,
)

_NUM_RESAMPLES = 200  # bootstrap resamples of the validation rows


def evaluate(session: TrainingSession) -> None:
    """Evaluate the final model, unless it was already evaluated after the last step.

    The fast step and the optimizer state are freed.
    """
    trainer, results = session.trainer, session.results
    with matmul_context(session.run):
        records = session.processes.from_first(lambda: results.records)
        if trainer.fast:
            trainer.fast.remove()
        trainer.forget_optimizer()
        if trainer.evaluator and not has_evaluation(records, trainer.state.global_step):
            trainer.evaluate()
        if not session.is_sharded:
            step = session.selected.step if session.selected else trainer.state.global_step
            session.answers.complete(trainer.evaluator, trainer.model, step)
    trim_heap()


def save(session: TrainingSession) -> None:
    """Save the adapter or full model, its tokenizer and card, atomically.

    Training-only modules of the model (modified) are removed.
    """
    session.listener.stage("saving and verifying")
    write = partial(_save, session)
    with explain_disk_errors(session.output_dir):
        if session.is_sharded:
            save_sharded(session.model, session.run, session.processes, write)
        else:
            write()


def _save(session: TrainingSession, weights: Mapping[str, Any] | None = None) -> None:
    """Save all files; `weights` is the gathered state dict of a sharded full model."""
    run, output_dir, module = session.run, session.output_dir, session.model.model
    partial_dir = output_dir.adapter.with_name(".adapter.partial")
    finalize_method(module, run.config.method, run.model.device, run.model.dtype)
    if partial_dir.exists():
        shutil.rmtree(partial_dir)
    if hasattr(module, "peft_config"):
        module.peft_config["default"].base_model_name_or_path = session.base["name"]
        save_adapter(module, run.config.method, partial_dir, session.model.initial_state)
    else:
        module.save_pretrained(str(partial_dir), state_dict=weights)
        save_legacy_rope(partial_dir)
    save_tokenizer_and_card(partial_dir, run, session.base, output_dir.adapter)
    flush_all(partial_dir)
    delete_adapter(output_dir.path)
    partial_dir.rename(output_dir.adapter)
    flush(output_dir.path)
    delete_unreachable_best(output_dir.checkpoints)


def verify(session: TrainingSession) -> Proof:
    """Compare the saved files with the trained model; raise RunError if they differ."""
    model, run, output_dir = session.model, session.run, session.output_dir
    gradients, processes = session.gradients, session.processes
    with explain_disk_errors(output_dir):
        if session.is_sharded:
            logits = session.initial_logits
            return verify_sharded_run(model, run, output_dir, gradients, processes, logits)
        why_no_effect = run.hooks.explain_no_effect(run, session.results.records)
        return verify_run(model, run, output_dir, gradients, why_no_effect)


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


def report(session: TrainingSession, proof: Proof) -> Mapping[str, Any]:
    """Save, show and, if set, upload the results; returns the contents of summary.json."""
    run, output_dir, listener = session.run, session.output_dir, session.listener
    evaluator, answers = session.trainer.evaluator, session.answers
    records = session.results.records
    summary = _create_summary(session, proof)
    facts, notes = run.hooks.describe(run, records)
    if session.teacher_info is not None:
        facts["distillation"] = session.teacher_info
    for note in notes:
        listener.warn(note)
    step = session.selected.step if session.selected else summary["steps"]
    initial, final = answers.of(0), answers.of(step)
    predictions: list[dict[str, Any]] = []
    if final is not None and evaluator is not None:
        where = run.data.validation_table.where
        predictions += iterate_results(
            final,
            run.data.info["labels"] or (),
            # without the directory, which a resumed run writes whole
            lambda row: where(row).rpartition("/")[2],
            base=initial if step else None,
            evaluator=evaluator,
        )
    summary["intervals"] = _intervals(final, evaluator)
    if initial is not None and evaluator is not None and run.objective.samples:
        summary["intervals_before"] = _intervals(initial, evaluator)
    summary |= {**facts, "next": next_commands(run, output_dir)}
    with explain_disk_errors(output_dir):
        _save_results(output_dir, run.config.method, summary, predictions)
    if predictions and summary["metrics_before"] and initial is None:
        listener.warn(
            "predictions before training are lost by --resume: use evaluate RUN --predictions FILE"
        )
    for warning in [
        *warn_if_not_learned(summary, run),
        *warn_if_worse(summary),
        *run.objective.get_warnings(summary["metrics"], summary["metrics_before"]),
        *run.hooks.get_warnings(run, records),
    ]:
        listener.warn(warning)
    _end_run(run.config.output, output_dir, summary, listener)
    return summary


def _create_summary(session: TrainingSession, proof: Proof) -> dict[str, Any]:
    """Returns the contents of summary.json: times in seconds, memory in bytes, loss in nats."""
    run, model, trainer = session.run, session.model.model, session.trainer
    records, events = session.results.records, session.output_dir.load_events()
    trainable, total = count_parameters(model)
    scores = [record for record in records if any(k.startswith("eval_") for k in record)]
    first = scores[0] if scores and scores[0]["step"] == 0 else {}
    last = scores[-1] if scores and scores[-1]["step"] > 0 else {}
    generated = trainer.evaluator.generated_rows if trainer.evaluator else 0
    best = session.selected
    selected = last if best is None else next(r for r in reversed(scores) if r["step"] == best.step)
    return {
        "run": str(session.output_dir.path),
        "recipe": session.inputs.recipe,
        "task": run.task.name,
        "headline": run.objective.headline,
        "method": run.config.method.kind,
        "model": {**session.base, "type": run.model.family},
        "adapter": run.adapter.describe() if run.adapter else None,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "class_weights": _class_weights(run),
        "data": {**run.data.info, "generated_rows": generated},
        "stops": _added_stops(run, model),
        "steps": trainer.state.global_step,
        "planned_steps": run.schedule.steps,
        **summarize_losses([record["loss"] for record in records if "loss" in record]),
        "metrics_before": _scores(first),
        "metrics": _scores(selected),
        "metrics_last": _scores(last),
        "best": None if best is None else best.describe(),
        "proof": asdict(proof),
        "timings": _measure_times(session),
        "speed": get_speed_info(trainer, run.fast.failure, session.comparison),
        "memory": {"peak_bytes": peak_memory_bytes(run.model.device)},
        "plan": session.memory.compare(session.initial_memory),
        "choices": [
            {"name": c.name, "value": str(c.value), "reason": c.reason} for c in run.choices
        ],
        "versions": library_versions(),
        "changed_on_resume": [event for event in events if "field" in event],
        "left_out": [event for event in events if "how" in event],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _measure_times(session: TrainingSession) -> dict[str, float]:
    """Returns seconds (to the first step, in training, in total) and tokens/s, for summary.json.

    Without a first step, the end of training takes its place.
    """
    report, start = session.results, session.inputs.start
    tokens = report.tokens or 0
    return {
        "to_first_step_s": round((report.first_step_at or session.trained_at) - start.at, 3),
        "to_first_step_cpu_s": round(report.first_step_cpu_s - start.cpu_s, 3),
        "train_s": round(report.train_s, 3),
        "total_s": round(time.perf_counter() - start.at, 3),
        "tokens_per_s": round(tokens / report.train_s, 1) if report.train_s else 0.0,
    }


def _added_stops(run: Run, model: Any) -> dict[str, int]:
    if not run.task.generates_text:
        return {}
    return added_stops(base_model(model).generation_config.eos_token_id, run.model.tokenizer)


def _class_weights(run: Run) -> dict[str, float]:
    weights = run.loss.class_weights
    return dict(zip(run.data.info["labels"], weights, strict=True)) if weights else {}


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}


def _intervals(record: ExampleRecord | None, evaluator: Evaluator | None) -> dict[str, list[float]]:
    """Returns metric → 95 % interval; metrics of generated text get none."""
    if record is None or evaluator is None or len(record.units) < 2:
        return {}
    selected = select_metrics(record.resample(_NUM_RESAMPLES, 0, None, ""), evaluator.metrics)
    return {name: interval(selected[name]) for name in sorted(selected)}


def _save_results(
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


def _end_run(
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
