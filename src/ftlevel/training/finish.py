"""What comes after the last step: the last evaluation, the files of a run, and its times."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ftlevel.artifacts.cards import write_readme
from ftlevel.artifacts.hub import push
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import OutputConfig, TrainConfig
from ftlevel.data.prepare.streamed_rows import StreamedRows
from ftlevel.errors import RunError
from ftlevel.events import Listener
from ftlevel.methods import needs_import
from ftlevel.models.rope import write_former_rope
from ftlevel.trained.adapt import finish_method, save_adapter
from ftlevel.training.callbacks.report import Report
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.summary import build_card, with_what_was_read
from ftlevel.training.trainer import FtlevelTrainer


def end_training(trainer: FtlevelTrainer, plan: Plan, records: Sequence[Mapping[str, Any]]) -> Plan:
    """Leave the fast step, evaluate, and return `plan` with what was read of a stream.

    Args:
        trainer: after its last step (mutated).
        plan: of the run.
        records: what was logged; an evaluation after the last step is not repeated.
    """
    if trainer.fast:
        trainer.fast.remove()
    if isinstance(trainer.train_dataset, StreamedRows):
        plan = with_what_was_read(plan, trainer.train_dataset)
    last = trainer.state.global_step
    if trainer.evaluator and not any("eval_loss" in r and r["step"] == last for r in records):
        trainer.evaluate()
    return plan


def save(
    adapted: Adapted, config: TrainConfig, plan: Plan, run: RunDirectory, base: Mapping[str, Any]
) -> None:
    """Write the adapter, or the whole model, with tokenizer and card; absent or whole.

    Args:
        adapted: the model, trained; what only training needs is taken from it.
        config: the whole configuration.
        plan: its plan.
        run: where to.
        base: what `describe_base` says of it.
    """
    model, partial = adapted.model, run.adapter.with_name(".adapter.partial")
    finish_method(model, config.method)
    if partial.exists():
        shutil.rmtree(partial)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base["name"]
        save_adapter(model, config.method, partial, adapted.start)
    else:
        model.save_pretrained(str(partial))
        write_former_rope(partial)
    plan.model.tokenizer.save_pretrained(str(partial))
    build_card(config, plan, base).write(partial)
    if run.adapter.exists():
        shutil.rmtree(run.adapter)
    partial.rename(run.adapter)


def write_results(run: RunDirectory, config: TrainConfig, summary: Mapping[str, Any]) -> None:
    """Write summary.json and the model card, which is the adapter's too."""
    run.write_summary(summary)
    run.write_card(write_readme(summary, needs_import(config.method)))
    shutil.copyfile(run.path / "README.md", run.adapter / "README.md")


def end_run(
    output: OutputConfig, run: RunDirectory, summary: Mapping[str, Any], listener: Listener
) -> None:
    """Upload the run where that is asked for, and say that it is done.

    Raises:
        RunError: the upload failed; it is said after the rest, which is whole.
    """
    failed: RunError | None = None
    if output.push_to_hub is not None:
        listener.stage("upload")
        try:
            url = push(run.adapter, output.push_to_hub, private=output.hub_private)
        except RunError as error:
            failed = error
        else:
            summary = {**summary, "hub": url}
            run.write_summary(summary)
    listener.end(summary)
    if failed is not None:
        raise failed


def measure_times(report: Report, trained_at: float, tokens: int) -> dict[str, float]:
    """Return seconds: from the start of the process, of the steps, and tokens a second of these.

    Args:
        report: of the run.
        trained_at: when training ended, by `time.perf_counter`.
        tokens: of the training rows.
    """
    import psutil

    began = report.first_step_at or trained_at
    since_start = time.time() - psutil.Process().create_time()
    return {
        "to_first_step_s": round(since_start - (time.perf_counter() - began), 3),
        "to_first_step_cpu_s": round(report.first_step_cpu_s, 3),
        "train_s": round(report.step_seconds, 3),
        "total_s": round(since_start, 3),
        "tokens_per_s": round(tokens / report.step_seconds, 1) if report.step_seconds else 0.0,
    }
