"""`ftlevel train`: flags, recipes and settings become one configuration, and the engine runs it."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Optional

import typer

from ftlevel.cli.flags import flag, read_config
from ftlevel.cli.heap import share_heaps
from ftlevel.cli.heavy_imports import uncollected_imports
from ftlevel.cli.launch import is_follower, is_launched, launch
from ftlevel.config import TrainConfig

# Optional[...] instead of `| None`: Typer evaluates these at run time on Python 3.10 as well.
Text = Optional[str]  # noqa: UP045
Int = Optional[int]  # noqa: UP045
Float = Optional[float]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045

WHAT, HOW, RUN = "Model, data and method", "Optimisation", "Run"


def train(
    context: typer.Context,
    recipe_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[RECIPE]", help="A recipe, or the config.yaml of a run."),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--recipe", help="A recipe; flags win over it.", rich_help_panel=WHAT),
    ] = None,
    method: Annotated[Text, flag("method.kind", "--method", panel=WHAT)] = None,
    model: Annotated[Text, flag("model.name_or_path", "--model", panel=WHAT)] = None,
    dataset: Annotated[
        Optional[list[str]],  # noqa: UP045
        flag("data.dataset", "--dataset", panel=WHAT),
    ] = None,
    mix: Annotated[Text, flag("data.mix", "--mix", panel=WHAT)] = None,
    split: Annotated[Text, flag("data.split", panel=WHAT)] = None,
    task: Annotated[Text, flag("task", "--task", panel=WHAT)] = None,
    quant: Annotated[Text, flag("quant.kind", "--quant", panel=WHAT)] = None,
    quant_type: Annotated[Text, flag("quant.quant_type", "--quant-type", panel=WHAT)] = None,
    double_quant: Annotated[
        Switch,
        flag("quant.double_quant", "--double-quant/--no-double-quant", panel=WHAT),
    ] = None,
    lora_r: Annotated[Int, flag("method.r", "--lora-r", panel=WHAT)] = None,
    lora_alpha: Annotated[Float, flag("method.lora_alpha", panel=WHAT)] = None,
    lora_dropout: Annotated[Float, flag("method.lora_dropout", panel=WHAT)] = None,
    target_modules: Annotated[
        Text, flag("method.target_modules", "--target-modules", panel=WHAT)
    ] = None,
    dora: Annotated[Switch, flag("method.use_dora", "--dora/--no-dora", panel=WHAT)] = None,
    rslora: Annotated[Switch, flag("method.use_rslora", "--rslora/--no-rslora", panel=WHAT)] = None,
    init: Annotated[Text, flag("method.init_lora_weights", "--init", panel=WHAT)] = None,
    lora_plus_ratio: Annotated[Float, flag("method.lora_plus_ratio", panel=WHAT)] = None,
    dtype: Annotated[Text, flag("model.dtype", "--dtype", panel=WHAT)] = None,
    bf16: Annotated[
        Switch, typer.Option("--bf16", help="Short for --dtype bfloat16.", rich_help_panel=WHAT)
    ] = None,
    fp16: Annotated[
        Switch, typer.Option("--fp16", help="Short for --dtype float16.", rich_help_panel=WHAT)
    ] = None,
    device: Annotated[Text, flag("model.device", panel=WHAT)] = None,
    format: Annotated[Text, flag("data.format", "--format", panel=WHAT)] = None,
    chat_template: Annotated[Text, flag("data.chat_template", panel=WHAT)] = None,
    max_length: Annotated[Text, flag("data.max_length", "--max-length", panel=WHAT)] = None,
    overlong: Annotated[Text, flag("data.overlong", panel=WHAT)] = None,
    validation_split: Annotated[Float, flag("data.validation_split", panel=WHAT)] = None,
    max_samples: Annotated[Int, flag("data.max_samples", "--max-samples", panel=WHAT)] = None,
    streaming: Annotated[
        Switch, flag("data.streaming", "--streaming/--no-streaming", panel=WHAT)
    ] = None,
    column_map: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--map",
            metavar="NAME=COLUMN",
            help="What the data calls a column: --map summary=abstract. Repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    cache: Annotated[
        Optional[bool],  # noqa: UP045
        flag("data.cache", "--cache/--no-cache", panel=WHAT),
    ] = None,
    on_bad_row: Annotated[Text, flag("data.on_bad_row", panel=WHAT)] = None,
    num_train_epochs: Annotated[
        Float, flag("train.num_train_epochs", "--num-train-epochs", panel=HOW)
    ] = None,
    max_steps: Annotated[Int, flag("train.max_steps", panel=HOW)] = None,
    learning_rate: Annotated[
        Float, flag("train.learning_rate", "--learning-rate", panel=HOW)
    ] = None,
    lr_scheduler_type: Annotated[Text, flag("train.lr_scheduler_type", panel=HOW)] = None,
    warmup_steps: Annotated[Float, flag("train.warmup_steps", panel=HOW)] = None,
    per_device_train_batch_size: Annotated[
        Int,
        flag("train.per_device_train_batch_size", panel=HOW),
    ] = None,
    gradient_accumulation_steps: Annotated[
        Int, flag("train.gradient_accumulation_steps", panel=HOW)
    ] = None,
    num_processes: Annotated[Int, flag("train.num_processes", panel=HOW)] = None,
    gradient_checkpointing: Annotated[
        Switch,
        flag(
            "train.gradient_checkpointing",
            "--gradient-checkpointing/--no-gradient-checkpointing",
            panel=HOW,
        ),
    ] = None,
    fast: Annotated[Switch, flag("speed.fast", "--fast/--no-fast", panel=HOW)] = None,
    verify_fast: Annotated[
        Switch, flag("speed.verify", "--verify-fast/--no-verify-fast", panel=HOW)
    ] = None,
    seed: Annotated[Int, flag("train.seed", panel=HOW)] = None,
    logging_steps: Annotated[Int, flag("train.logging_steps", panel=HOW)] = None,
    eval_steps: Annotated[Int, flag("train.eval_steps", panel=HOW)] = None,
    eval_on_start: Annotated[
        Switch, flag("train.eval_on_start", "--eval-on-start/--no-eval-on-start", panel=HOW)
    ] = None,
    save_steps: Annotated[Int, flag("train.save_steps", panel=RUN)] = None,
    output_dir: Annotated[Text, flag("output.dir", "--output-dir", panel=RUN)] = None,
    overwrite: Annotated[
        Switch,
        flag("output.overwrite", "--overwrite/--no-overwrite", panel=RUN),
    ] = None,
    resume: Annotated[Switch, flag("output.resume", "--resume/--no-resume", panel=RUN)] = None,
    report_to: Annotated[Text, flag("output.report_to", panel=RUN)] = None,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set any field; repeatable.", rich_help_panel=RUN
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Resolve, check and show; train nothing.", rich_help_panel=RUN
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, nothing else.", rich_help_panel=RUN),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=RUN)
    ] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of recipes.", rich_help_panel=RUN),
    ] = False,
    show_traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where an error arose.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """Fine-tune a model on a file of examples.

    With no --model and no --dataset, trains the built-in model on the built-in examples. Every
    other field of a recipe can be set by --set section.key=value; --schema lists them all.
    """
    if schema:
        typer.echo(json_module.dumps(TrainConfig.model_json_schema(), indent=2))
        return
    config, origin = read_config(context.params)
    processes = config.train.num_processes or 1
    if processes > 1 and not dry_run and not is_launched():
        raise typer.Exit(launch(context.obj or [], processes))
    follows = is_follower()
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet or follows) as screen:
        share_heaps()
        with uncollected_imports():
            from ftlevel.commands.train import train as run

        result = run(config, listener=screen, dry_run=dry_run, recipe=origin)
    if as_json and not follows:
        typer.echo(json_module.dumps(result.summary, default=str))
