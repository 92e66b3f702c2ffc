"""`launch`: job files of cluster schedulers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DAILY, option

    declare = partial(option, on=("launch",), panel=DAILY)
    number = partial(declare, type=int, metavar="N")
    return [
        declare(
            "--on", "Scheduler to write the job file for.", required=True, metavar="slurm|k8s|ray"
        ),
        number("--nodes", "Number of machines.", default=1, minimum=1),
        number(
            "--gpus-per-node", "Number of GPUs per machine; 0 trains on CPUs.", default=0, minimum=0
        ),
        number(
            "--processes-per-node",
            "Number of processes per machine; default: one per GPU.",
            minimum=1,
        ),
        declare("--image", "Container image with ftlevel installed (k8s).", metavar="IMAGE"),
        declare(
            "--claim", "Persistent volume claim, mounted above --output-dir (k8s).", metavar="NAME"
        ),
        declare(
            "--job-option",
            "Additional scheduler option, e.g. partition=gpu; repeatable.",
            type=list[str],
            metavar="NAME[=VALUE]",
        ),
        declare(
            "--job-file",
            "Path of the job file; default: named after the run, in this directory.",
            type=Path,
            metavar="FILE",
        ),
        declare("--submit", "Whether to submit the job.", type=bool),
        declare("--dry-run", "Whether to only print the job file.", type=bool),
    ]


EXTENSION = Extension(
    commands={
        "launch": Command(
            "ftlevel.extras.launch.cli:launch",
            "Write the job file of a cluster run, and optionally submit it.",
            config="ftlevel.config.train:TrainConfig",
            accepts=lambda _: True,  # a job needs the output flags too
        )
    },
    flags=_flags,
)
