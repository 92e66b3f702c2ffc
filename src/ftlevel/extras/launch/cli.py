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

import typer

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError, RunError

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
    def command(self) -> str:
        """Command line of the run, quoted for a shell."""
        return shlex.join(self.args)

    @property
    def resources(self) -> dict[str, float]:
        """Custom Ray resources that each worker requests, from `options`."""
        return {name: float(value) for name, value in self.options.items()}

    @property
    def quoted(self) -> list[str]:
        """Arguments of the run, each quoted for YAML and Python."""
        return [json.dumps(argument) for argument in self.args]


def render(job: Job) -> str:
    """Returns the text of the job file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # not HTML; `Job` quotes the arguments
    )
    text: str = environment.get_template(TEMPLATES[job.scheduler]).render(job=job)
    return text


_OURS = {
    row.name: row.metadata("launch").type is not bool for row in FLAGS if row.on == ("launch",)
}
_AMOUNT = re.compile(r"\d+(\.\d+)?")
_OURS["--json"] = False
"""Flags of `launch` that `train` does not have → whether a value follows."""


@dataclass(frozen=True)
class Cluster:
    """Resources per machine to request; `processes` None means one per GPU.

    `image` and `claim` (persistent volume claim) are for Kubernetes.
    """

    scheduler: str
    nodes: int
    gpus: int
    processes: int | None
    image: str
    claim: str
    options: Sequence[str]


def build_job(config: TrainConfig, args: Sequence[str], cluster: Cluster) -> Job:
    """Build the job that runs `config`; `args` is the command line of `ftlevel launch`.

    Raises ConfigError with all missing and conflicting options.
    """
    output, problems = config.output, []
    if output.dir is None:
        problems.append(
            "ftlevel launch needs the run to resume when the job is requeued. Add --output-dir "
            "DIR, on a file system that all machines share."
        )
    if output.overwrite:
        problems.append(
            "--overwrite cannot be used with ftlevel launch: a requeued job would delete its own "
            "run. Remove the old run, or choose another --output-dir."
        )
    if config.train.num_processes is not None:
        problems.append(
            "--num-processes cannot be used with ftlevel launch, whose scheduler starts the "
            "processes. Use --nodes and --gpus-per-node, or --processes-per-node."
        )
    if cluster.scheduler == "k8s" and not (cluster.image and cluster.claim):
        problems.append(
            "--on k8s needs --image IMAGE that contains ftlevel, and --claim NAME of the "
            "persistent volume claim for --output-dir."
        )
    elsewhere = cluster.scheduler in ("k8s", "ray")
    if elsewhere and output.dir is not None and not output.dir.is_absolute():
        problems.append(
            f"--output-dir {output.dir}: --on {cluster.scheduler} needs an absolute path."
        )
    elif (
        cluster.scheduler == "k8s"
        and output.dir is not None
        and output.dir.parent.parent == output.dir.parent
    ):
        problems.append(
            f"--output-dir {output.dir}: the claim would be mounted as /. Name a directory in one."
        )
    options = dict(_option(text, problems) for text in cluster.options)
    problems += [
        f"--job-option {name}={value}: expected a number for each resource of a worker, such as "
        f"CPU=4."
        for name, value in options.items()
        if cluster.scheduler == "ray" and not _AMOUNT.fullmatch(value)
    ]
    if problems or output.dir is None:
        raise ConfigError(problems)
    processes = cluster.processes or max(cluster.gpus, 1)
    words = re.sub(r"[^a-z0-9]+", "-", output.dir.name.lower()).strip("-")
    values = train_arguments(args)
    values = values if "--resume" in values else [*values, "--resume"]
    return Job(
        cluster.scheduler,
        cluster.nodes,
        processes,
        cluster.gpus,
        values,
        output.dir,
        f"ftlevel-{words}"[:63].rstrip("-"),
        cluster.image,
        cluster.claim,
        options,
    )


def _option(text: str, problems: list[str]) -> tuple[str, str]:
    """Parse a `--job-option` as (name, value); append a message to `problems` if it is invalid."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][A-Za-z-]*", name) or "\n" in value:
        problems.append(f"--job-option {text!r}: expected NAME or NAME=VALUE, as partition=gpu.")
    return name, value


def train_arguments(args: Sequence[str]) -> list[str]:
    """Returns the `ftlevel train` arguments for those of `ftlevel launch`."""
    train_args: list[str] = []
    is_value = False
    for argument in args:
        name, has_value, _ = argument.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if is_value:
            is_value = False
        elif name in _OURS:
            is_value = _OURS[name] and not has_value
        else:
            train_args.append(argument)
    return ["train", *train_args[1:]]


def write_job(job: Job, path: Path) -> str:
    """Write the job file and return the text; raises ConfigError if `path` exists."""
    text = render(job)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--job-file {path} already exists. Remove it, or choose another file."
        ) from None
    return text


def submit_job(job: Job, path: Path) -> str:
    """Submit the job file at `path` to the scheduler, and return the scheduler's output.

    Raises ConfigError if the scheduler's program is not installed, RunError if submission fails.
    """
    command = [*SUBMIT[job.scheduler], str(path.resolve() if job.scheduler == "ray" else path)]
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"--submit: there is no {command[0]} here. Run {' '.join(command)} where there is."
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


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
    config, _ = read_config(inputs)
    if on not in SUBMIT:
        raise ConfigError(f"--on {on}: expected one of {', '.join(SUBMIT)}.")
    values = inputs.values
    cluster = Cluster(
        on,
        values["nodes"],
        values["gpus_per_node"],
        values["processes_per_node"],
        values["image"] or "",
        values["claim"] or "",
        values["job_option"] or (),
    )
    job = build_job(config, inputs.args, cluster)
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
