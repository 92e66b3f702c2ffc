"""Train: resolve → load → adapt → train → save → prove. Whoever reads this has read the product."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import write_readme
from ftlevel.artifacts.claim import claimed
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.recipe import describe_recipe
from ftlevel.artifacts.run_directory import RunDirectory, check_output, open_run
from ftlevel.config import AdaloraSpec, LoraSpec, TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.prepare.streamed_rows import StreamedRows
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.events import Listener, Silence
from ftlevel.fast.plan.low_rank import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.methods.lora_start import copy_start
from ftlevel.models.loading import quiet_libraries
from ftlevel.trained.adapt import apply_method, finish_method, save_adapter
from ftlevel.training.arguments import build_arguments, build_evaluator, count_steps, doubts
from ftlevel.training.callbacks.allocation import Allocation
from ftlevel.training.callbacks.watch import (
    Certify,
    FollowEpoch,
    GradientProof,
    Interrupt,
    KeepStream,
    Report,
)
from ftlevel.training.disk import explain_disk_errors
from ftlevel.training.fast_step import describe_speed, speed_up
from ftlevel.training.interrupted import describe_stop, telling_what_is_kept
from ftlevel.training.model import base_of, load_base, prepare_start
from ftlevel.training.plan.packages import check_packages
from ftlevel.training.plan.resolve import Plan, default_name, resolve
from ftlevel.training.plan.trainable import count_trainable
from ftlevel.training.processes import Processes, settle_processes, started_processes
from ftlevel.training.proof import Proof, check_saved, probe_batch
from ftlevel.training.resume import check_same_run, find_checkpoint, origin_of
from ftlevel.training.row_order import rows_and_order
from ftlevel.training.summary import (
    build_card,
    build_summary,
    describe_base,
    dump_config,
    with_what_was_read,
)
from ftlevel.training.trainer import FtlevelTrainer


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        summary: what summary.json holds.
        path: the run directory; None after a dry run.
        model: the trained model, on its device; None after a dry run.
        tokenizer: its tokenizer.
    """

    summary: Mapping[str, Any]
    path: Path | None
    model: Any
    tokenizer: Any


def train(
    config: TrainConfig,
    *,
    listener: Listener | None = None,
    dry_run: bool = False,
    recipe: Path | None = None,
) -> TrainResult:
    """Fine-tune as `config` says and write a run directory.

    Args:
        config: the whole configuration.
        listener: told of the run's course; nobody by default.
        dry_run: resolve and check everything, train and write nothing.
        recipe: the file that `config` was read from, to be named in summary.json.

    Raises:
        ConfigError: something is wrong that can be known before weights load.
        RunError: training failed: a gradient that is missing or not finite, a saved adapter that
            is not the trained one.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train() was given {type(config).__name__}. Expected a TrainConfig, as "
            "TrainConfig(task=…), or FineTunePipeLine(args_dir=FILE).config for a recipe."
        )
    listener = listener or Silence()
    processes = started_processes()
    config = settle_processes(config, processes, rows_only=dry_run)
    output = config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config)
    origin = describe_recipe(recipe) if recipe else None
    with quiet_libraries():
        listener.stage("read the data and the model's shape")
        plan = resolve(config, progress=listener.progress)
        listener.choices("train", [*plan.choices, *_size_choices(config, plan, dry_run)])
        for doubt in doubts(config.train, len(plan.data.train), len(plan.data.validation)):
            listener.warn(doubt)
        if dry_run:
            summary = {"dry_run": True, "steps": count_steps(config.train, len(plan.data.train)),
                       "data": plan.data.facts, "targets": plan.targets}  # fmt: skip
            listener.end(summary)
            return TrainResult(summary, None, None, plan.tokenizer)
        with contextlib.ExitStack() as held:
            return _train(config, plan, listener, origin, processes, held)


def _train(
    config: TrainConfig,
    plan: Plan,
    listener: Listener,
    recipe: Mapping[str, Any] | None,
    processes: Processes,
    held: contextlib.ExitStack,
) -> TrainResult:
    processes.join(plan.device)
    listener.stage("load the model")
    fused = uses_fused_layers(config, plan.device)
    base = base_of(config, plan)
    model = apply_method(load_base(config, plan), config.method, base, fused=fused)
    prepare_start(model, config, plan)
    fast, verified = speed_up(model, config, plan, listener)
    start = copy_start(model)
    base_facts = describe_base(plan.source)
    run, checkpoint = processes.from_first(lambda: _open(config, plan, base_facts, listener))
    if processes.is_first:
        held.enter_context(claimed(run.path))
    held.enter_context(telling_what_is_kept(run))
    evaluator = build_evaluator(config, plan)
    trainer = build_trainer(config, plan, model, evaluator, run, fast)
    stream = trainer.train_dataset if isinstance(trainer.train_dataset, StreamedRows) else None
    if stream and checkpoint:
        stream.restore(checkpoint)
    gradients, interrupt = GradientProof(listener), Interrupt(processes, plan.device)
    report = Report(
        listener, run.log if processes.is_first else (lambda _: None),
        lambda: int(trainer.tokens_seen),
    )  # fmt: skip
    certify = Certify(run.checkpoints, config.train.save_total_limit, processes)
    for callback in (report, gradients, interrupt, FollowEpoch(plan.data.train, trainer.order),
                     *method_callbacks(config, run, writes=processes.is_first),
                     *([KeepStream(stream, run.checkpoints)] if stream else []),
                     certify):  # fmt: skip
        trainer.add_callback(callback)

    listener.stage("train")
    with interrupt, explain_disk_errors(run):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.received and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(describe_stop(run, trainer.state))
    if not processes.is_first:
        return TrainResult({}, run.path, model, plan.tokenizer)
    trained_at = time.perf_counter()
    if fast:
        fast.remove()
    if stream:
        plan = with_what_was_read(plan, stream)
    if evaluator and not any("eval_loss" in r and r["step"] == trainer.state.global_step
                             for r in report.records):  # fmt: skip
        trainer.evaluate()

    listener.stage("save and check")
    finish_method(model, config.method)
    with explain_disk_errors(run):
        save(model, plan, run, build_card(config, plan, base_facts), base_facts, start)
    probe = probe_batch(
        plan.data.validation or plan.data.train,
        plan.tokenizer.pad_token_id,
        plan.device,
        plan.objective,
        plan.model_config.get_text_config().vocab_size,
    )
    frozen, difference, effect = check_saved(
        model,
        run.adapter,
        lambda: load_base(config, plan),
        probe,
        objective=plan.objective,
        device=plan.device,
        dtype=plan.dtype,
    )
    rows = len(probe["input_ids"])
    proof = Proof(gradients.checked, len(gradients.idle), frozen, difference, effect, rows)
    summary = build_summary(
        config,
        plan,
        run=str(run.path),
        recipe=recipe,
        base=base_facts,
        model=model,
        records=report.records,
        proof=asdict(proof),
        timings=_timings(report, trained_at, int(trainer.tokens_seen)),
        generated_rows=evaluator.generated_rows if evaluator else 0,
        speed=describe_speed(trainer, verified),
    )
    with explain_disk_errors(run):
        run.write_summary(summary)
        run.write_card(write_readme(summary))
        shutil.copyfile(run.path / "README.md", run.adapter / "README.md")
    listener.end(summary)
    return TrainResult(summary, run.path, model, plan.tokenizer)


def _open(
    config: TrainConfig, plan: Plan, base: Mapping[str, Any], listener: Listener
) -> tuple[RunDirectory, Path | None]:
    """Return the run directory, and the checkpoint to go on from when resuming."""
    output, origin = config.output, origin_of(config, plan, base)
    if output.resume and output.dir is not None:
        run = RunDirectory(output.dir)
        check_same_run(run, origin)
        return run, find_checkpoint(run, listener)
    run = open_run(output.dir, default_name(config), overwrite=output.overwrite)
    run.write_config(dump_config(config, plan))
    write_json(run.checkpoints / "origin.json", origin)
    return run, None


def method_callbacks(config: TrainConfig, run: RunDirectory, *, writes: bool) -> list[Any]:
    """Return what a method does while training, beside its gradient steps.

    Args:
        config: the configuration.
        run: of whose checkpoints it keeps its state in.
        writes: whether this process writes them.
    """
    is_pruned = isinstance(config.method, AdaloraSpec)
    return [Allocation(run.checkpoints, writes=writes)] if is_pruned else []


def build_optimizer(config: TrainConfig, model: Any, arguments: Any) -> Any:
    """Return LoRA+'s optimizer if a ratio is asked for; None leaves the choice to Trainer.

    PEFT gives B, and every vector such as a head's bias, `lora_plus_ratio` times A's rate.
    """
    ratio = config.method.lora_plus_ratio if isinstance(config.method, LoraSpec) else None
    if ratio is None:
        return None
    from peft.optimizers import create_loraplus_optimizer

    optimizer_class, settings = FtlevelTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    rate = settings.pop("lr")
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **settings,
    )


def build_trainer(
    config: TrainConfig,
    plan: Plan,
    model: Any,
    evaluator: Any,
    run: RunDirectory,
    fast: FastStep | None,
) -> FtlevelTrainer:
    """Return the Trainer of the run, without any of the libraries' own printing."""
    from transformers import PrinterCallback, ProgressCallback

    from ftlevel.data.encoding.collate import Collator

    arguments = build_arguments(config, plan, run.checkpoints)
    rows, order = rows_and_order(config, plan, arguments)
    method = METHODS.get(config.method.kind)
    pad_id = plan.tokenizer.pad_token_id
    trainer = FtlevelTrainer(
        objective=plan.objective,
        evaluator=evaluator,
        model=model,
        args=arguments,
        optimizers=(build_optimizer(config, model, arguments), None),
        penalty=method.penalty if method else None,
        train_dataset=rows,
        eval_dataset=plan.data.validation or None,
        data_collator=StepCollator(pad_id, fast.plan) if fast else Collator(pad_id),
        fast=fast,
        order=order,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def save(
    model: Any,
    plan: Plan,
    run: RunDirectory,
    card: Any,
    base: Mapping[str, Any],
    start: dict[str, Any],
) -> None:
    """Write the adapter, or the whole model, with tokenizer and card; absent or whole."""
    partial = run.adapter.with_name(".adapter.partial")
    if partial.exists():
        shutil.rmtree(partial)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base["name"]
        save_adapter(model, partial, start)
    else:
        model.save_pretrained(str(partial))
    plan.tokenizer.save_pretrained(str(partial))
    card.write(partial)
    if run.adapter.exists():
        shutil.rmtree(run.adapter)
    partial.rename(run.adapter)


def _size_choices(config: TrainConfig, plan: Plan, dry_run: bool) -> list[Choice]:
    steps = count_steps(config.train, len(plan.data.train))
    epochs = f"{config.train.num_train_epochs:g} epochs"
    reason = "" if config.train.max_steps else f"{epochs} of {len(plan.data.train):,} rows"
    trainable, total = count_trainable(config, plan, base_of(config, plan), try_method=dry_run)
    return [
        Choice("trainable", f"{trainable:,} of {total:,}", f"{trainable / total:.2%}"),
        Choice("steps", f"{steps:,}", reason),
    ]


def _timings(report: Report, trained_at: float, tokens: int) -> dict[str, float]:
    """Return seconds: from the start of the process, of the steps, and tokens a second of these."""
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
