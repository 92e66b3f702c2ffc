"""`launch`: write and submit the job file of a multi-machine run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError, RunError
from ftlevel.extras.launch.jobs import SUBMIT, Job, render

_OURS = {
    row.shown: row.metadata("launch").type is not bool for row in FLAGS if row.on == ("launch",)
}
_AMOUNT = re.compile(r"\d+(\.\d+)?")
_OURS["--json"] = False
"""Flags of `launch` that `train` does not have → whether a value follows."""


@dataclass(frozen=True)
class Cluster:
    """Resources requested from a scheduler, per machine; `processes` None means one per GPU.

    `image` and `claim` (persistent volume claim) are for Kubernetes.
    """

    scheduler: str
    nodes: int
    gpus: int
    processes: int | None
    image: str
    claim: str
    options: Sequence[str]


def build_job(config: TrainConfig, arguments: Sequence[str], cluster: Cluster) -> Job:
    """Return the job that runs `config`; `arguments` is the command line of `ftlevel launch`.

    Raises:
        ConfigError: with every missing or conflicting option.
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
    given = train_arguments(arguments)
    given = given if "--resume" in given else [*given, "--resume"]
    return Job(
        cluster.scheduler,
        cluster.nodes,
        processes,
        cluster.gpus,
        given,
        output.dir,
        f"ftlevel-{words}"[:63].rstrip("-"),
        cluster.image,
        cluster.claim,
        options,
    )


def _option(text: str, problems: list[str]) -> tuple[str, str]:
    """Parse a `--job-option`; append a message to `problems` if it is invalid."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z][A-Za-z-]*", name) or "\n" in value:
        problems.append(f"--job-option {text!r}: expected NAME or NAME=VALUE, as partition=gpu.")
    return name, value


def train_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the `ftlevel train` command line for that of `ftlevel launch`."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if is_value:
            is_value = False
        elif name in _OURS:
            is_value = _OURS[name] and not has_value
        else:
            kept.append(argument)
    return ["train", *kept[1:]]


def write_job(job: Job, place: Path) -> str:
    """Write the file of `job` to `place` and return its text; raise ConfigError if it exists."""
    text = render(job)
    try:
        with place.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--job-file {place} already exists. Remove it, or choose another file."
        ) from None
    return text


def submit(job: Job, place: Path) -> str:
    """Submit the file at `place` to the scheduler of `job`, and return its output.

    Raises:
        ConfigError: the scheduler's program is not installed.
        RunError: submission fails.
    """
    command = [*SUBMIT[job.scheduler], str(place.resolve() if job.scheduler == "ray" else place)]
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"--submit: there is no {command[0]} here. Run {' '.join(command)} where there is."
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
