"""A run as a job: what it asks of a cluster, and the file that says so to its scheduler.

Files by which the scheduler of a cluster starts a run on several machines. Imports nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TEMPLATES = {
    "slurm": "slurm.sh.jinja", "k8s": "pytorchjob.yaml.jinja", "ray": "ray_train.py.jinja",
}  # fmt: skip
"""Scheduler → the template of its file."""

SUFFIXES = {"slurm": "sbatch", "k8s": "yaml", "ray": "py"}
"""Scheduler → how its file's name ends."""

SUBMIT = {
    "slurm": ("sbatch",), "k8s": ("kubectl", "create", "-f"),
    "ray": ("ray", "job", "submit", "--no-wait", "--", "python"),
}  # fmt: skip
"""Scheduler → the command that takes the file."""


@dataclass(frozen=True)
class Job:
    """What is asked of a cluster.

    Attributes:
        scheduler: a key of `TEMPLATES`.
        nodes: machines.
        processes: of each machine.
        gpus: of each machine; none for a run on CPUs.
        arguments: of `ftlevel`, with `--resume`: the same line begins a run and goes on with it.
        output: the run directory.
        name: of the job, in small letters, digits and dashes.
        image: of the container, on Kubernetes.
        claim: the persistent volume claim that holds the run directory there.
        options: more that the scheduler is asked for, by its own names.
    """

    scheduler: str
    nodes: int
    processes: int
    gpus: int
    arguments: Sequence[str]
    output: Path
    name: str
    image: str = ""
    claim: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The arguments as a shell reads them."""
        return shlex.join(self.arguments)

    @property
    def resources(self) -> dict[str, float]:
        """What a worker of Ray's asks for beside its GPU, as `options` say."""
        return {name: float(value) for name, value in self.options.items()}

    @property
    def quoted(self) -> list[str]:
        """The arguments as YAML and Python read them."""
        return [json.dumps(argument) for argument in self.arguments]


def render(job: Job) -> str:
    """Return the file of `job`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is no page; `Job` quotes words
    )
    text: str = environment.get_template(TEMPLATES[job.scheduler]).render(job=job)
    return text
