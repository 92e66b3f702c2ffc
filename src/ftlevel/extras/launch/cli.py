"""`ftlevel launch`: write the job file of a run for a cluster's scheduler, and submit it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.spelling import OFF, ON
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError, RunError, excludes, needs
from ftlevel.safe_io import start_process

TEMPLATES = {"slurm": "slurm.sh.jinja", "k8s": "pytorchjob.yaml.jinja", "ray": "ray_train.py.jinja"}
"""Scheduler → template of its job file."""

SUFFIXES = {"slurm": "sbatch", "k8s": "yaml", "ray": "py"}
"""Scheduler → suffix of its job file."""

SUBMIT = {
    "slurm": ("sbatch",),
    "k8s": ("kubectl", "create", "-f"),
    "ray": ("ray", "job", "submit", "--no-wait", "--", "python"),
}
"""Scheduler → command that submits the job file."""


@dataclass(frozen=True)
class Job:
    """A run as a job of a cluster; `processes` and `gpus` are per node.

    `args` include `--resume`, so that one command line starts and resumes the run. `image` and
    `claim` (a persistent volume claim) are for Kubernetes.
    """

    scheduler: str
    nodes: int
    processes: int
    gpus: int
    args: Sequence[str]
    output: Path
    name: str
    image: str
    claim: str
    options: Mapping[str, str]

    @property
    def resources(self) -> dict[str, float]:
        """Custom Ray resources that each worker requests, from `options`."""
        return {name: float(value) for name, value in self.options.items()}


def render(job: Job) -> str:
    """Returns the text of the job file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # not HTML; templates quote for a shell, or as JSON for YAML and Python
    )
    environment.filters["quote"] = shlex.quote
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # for YAML
    text: str = environment.get_template(TEMPLATES[job.scheduler]).render(job=job)
    return text


_OURS = {
    row.name: row.metadata("launch").type is not bool for row in FLAGS if row.on == ("launch",)
} | {"--json": False}
"""Flags of `launch` that `train` does not have → whether a value follows."""
_AMOUNT = re.compile(r"\d+(\.\d+)?")


def build_job(config: TrainConfig, args: Sequence[str], values: Mapping[str, Any]) -> Job:
    """Build the job that runs `config`; `args` is the command line of `ftlevel launch`.

    `values` has its flags by parameter, as in `CommandInput`. Raises ConfigError with all missing
    and conflicting options.
    """
    output, scheduler, launch = config.output, values["on"], "ftlevel launch"
    problems = [
        message(*texts)
        for is_conflict, message, *texts in (
            (output.dir is None, needs, launch, "--output-dir DIR",
             "the job resumes this run when it is requeued",
             "Name a directory on a file system that all machines share."),
            (output.overwrite, excludes, "--overwrite", launch,
             "a requeued job would delete its own run",
             "Remove the old run, or choose another --output-dir."),
            (config.train.num_processes is not None, excludes, "--num-processes", launch,
             "the scheduler starts the processes",
             "Use --nodes and --gpus-per-node, or --processes-per-node."),
            (scheduler == "k8s" and not (values["image"] and values["claim"]), needs, "--on k8s",
             "--image IMAGE and --claim NAME",
             "the image contains ftlevel, and --output-dir is in the persistent volume claim"),
        )
        if is_conflict
    ]  # fmt: skip
    if output.dir is not None and scheduler != "slurm" and not output.dir.is_absolute():
        problems.append(f"--output-dir {output.dir}: --on {scheduler} needs an absolute path.")
    elif output.dir is not None and scheduler == "k8s" and len(output.dir.parts) < 3:
        problems.append(
            f"--output-dir {output.dir}: the claim would be mounted as /. Name a directory in one."
        )
    options = dict(_option(text, problems) for text in values["job_option"] or ())
    problems += [
        f"--job-option {name}={value}: expected a number for each resource of a worker, such as "
        f"CPU=4."
        for name, value in options.items()
        if scheduler == "ray" and not _AMOUNT.fullmatch(value)
    ]
    if problems or output.dir is None:
        raise ConfigError(problems)
    words = re.sub(r"[^a-z0-9]+", "-", output.dir.name.lower()).strip("-")
    train_args = train_arguments(args)
    return Job(
        scheduler,
        values["nodes"],
        values["processes_per_node"] or max(values["gpus_per_node"], 1),
        values["gpus_per_node"],
        train_args if "--resume" in train_args else [*train_args, "--resume"],
        output.dir,
        f"ftlevel-{words}"[:63].rstrip("-"),
        values["image"] or "",
        values["claim"] or "",
        options,
    )


def _option(text: str, problems: list[str]) -> tuple[str, str]:
    """Parse a `--job-option` as (name, value); append a message to `problems` if it is invalid."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][\w:-]*", name) or "\n" in value:
        problems.append(f"--job-option {text!r}: expected NAME or NAME=VALUE, as partition=gpu.")
    return name, value


def train_arguments(args: Sequence[str]) -> list[str]:
    """Returns the `ftlevel train` arguments for those of `ftlevel launch`."""
    train_args, rest = ["train"], list(args[1:])
    while rest:
        argument = rest.pop(0)
        name, has_value, _ = argument.partition("=")
        if (name := name.replace("_", "-")) not in _OURS:
            train_args.append(argument)
        elif not has_value and rest and (_OURS[name] or rest[0].lower() in (*ON, *OFF)):
            rest.pop(0)
    return train_args


def write_job(job: Job, path: Path) -> None:
    """Write the job file; raises ConfigError if `path` exists."""
    text = render(job)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--job-file {path} already exists. Remove it, or choose another file."
        ) from None


def submit_job(job: Job, path: Path) -> str:
    """Submit the job file at `path` to the scheduler, and return the scheduler's output.

    Raises ConfigError if the scheduler's program is not installed, RunError if submission fails.
    """
    command = [*SUBMIT[job.scheduler], str(path.resolve() if job.scheduler == "ray" else path)]
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"--submit: there is no {command[0]} here. Run {' '.join(command)} where there is."
        )
    process = start_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, error = process.communicate()
    if process.returncode:
        raise RunError(f"{' '.join(command)} ended with {process.returncode}: {error.strip()}")
    return str(output).strip()


def launch(
    inputs: CommandInput,
    *,
    on: str,
    job_file: Path | None,
    submit: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the job file of a cluster run, and optionally submit it.

    Accepts the flags of train and validates them. A preempted job is requeued and resumes from its
    latest checkpoint. --dry-run prints the file only.
    """
    config, recipe = read_config(inputs)
    args = inputs.args
    if recipe is None and inputs.values["model"] is None and inputs.values["dataset"] is None:
        args = [*args, "--dataset", config.data.dataset]  # --resume alone expects a run
    if on not in SUBMIT:
        raise ConfigError(f"--on {on}: expected one of {', '.join(SUBMIT)}.")
    job = build_job(config, args, inputs.values)
    if dry_run:
        if as_json:
            typer.echo(json.dumps({"job": render(job)}))
        else:
            typer.echo(render(job), nl=False)
        return
    path = job_file or Path(f"{job.name}.{SUFFIXES[on]}")
    write_job(job, path)
    command = f"{' '.join(SUBMIT[on])} {path}"
    output = submit_job(job, path) if submit else ""
    if as_json:
        typer.echo(json.dumps({"file": str(path), "command": command, "submitted": output}))
    else:
        typer.echo(f"job: {path}")
        typer.echo(output or f"submit it: {command}")
