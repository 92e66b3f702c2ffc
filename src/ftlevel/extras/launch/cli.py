"""`ftlevel launch`: write the job file of a run for a cluster scheduler."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.errors import ConfigError

_SCHEDULERS = ("slurm", "k8s", "ray")


def launch(
    given: CommandInput,
    *,
    on: str,
    job_file: Path | None,
    submit: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the job file of a cluster run, and optionally submit it.

    Accepts the flags of train and validates them. A preempted job is requeued and resumes from its
    newest checkpoint. --dry-run prints the file only.
    """
    config, _ = read_config(given)
    from ftlevel.extras.launch.jobs import SUBMIT, SUFFIXES, render
    from ftlevel.extras.launch.launch import Cluster, build_job, write_job
    from ftlevel.extras.launch.launch import submit as hand_over

    if on not in _SCHEDULERS:
        raise ConfigError(f"--on {on}: expected one of {', '.join(_SCHEDULERS)}.")
    own = given.values
    cluster = Cluster(
        on,
        own["nodes"],
        own["gpus_per_node"],
        own["processes_per_node"],
        own["image"] or "",
        own["claim"] or "",
        own["job_option"] or (),
    )
    job = build_job(config, given.arguments, cluster)
    if dry_run:
        if as_json:
            typer.echo(json_module.dumps({"job": render(job)}))
        else:
            typer.echo(render(job), nl=False)
        return
    place = job_file or Path(f"{job.name}.{SUFFIXES[on]}")
    write_job(job, place)
    command = f"{' '.join(SUBMIT[on])} {place}"
    said = hand_over(job, place) if submit else ""
    if as_json:
        typer.echo(json_module.dumps({"file": str(place), "command": command, "submitted": said}))
    else:
        typer.echo(f"job: {place}")
        typer.echo(said or f"submit it: {command}")
