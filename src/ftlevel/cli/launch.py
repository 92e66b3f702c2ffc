"""`ftlevel launch`: a run on a cluster, as the file that its scheduler takes."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

from ftlevel.cli.flags import Given, read_config
from ftlevel.errors import ConfigError

_SCHEDULERS = ("slurm", "k8s", "ray")


def launch(
    given: Given, *, on: str, job_file: Path | None, submit: bool, dry_run: bool, as_json: bool
) -> None:
    """Write the file by which a cluster starts a run on several machines; submit it if told.

    Takes the flags of train, which are checked here. The job is requeued where it is preempted or
    its time is over, and goes on from its newest checkpoint. With --dry-run the file is printed,
    and nothing is written.
    """
    config, _ = read_config(given)
    from ftlevel.artifacts.jobs import SUBMIT, SUFFIXES, render
    from ftlevel.commands.launch import Cluster, build_job, write_job
    from ftlevel.commands.launch import submit as hand_over

    if on not in _SCHEDULERS:
        raise ConfigError(f"--on {on}: expected one of {', '.join(_SCHEDULERS)}.")
    own = given.values
    cluster = Cluster(on, own["nodes"], own["gpus_per_node"], own["processes_per_node"],
                      own["image"] or "", own["claim"] or "", own["job_option"] or ())  # fmt: skip
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
