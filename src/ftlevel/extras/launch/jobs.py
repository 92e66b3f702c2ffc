"""Render a run as a job file for a cluster's scheduler; imports nothing of ftlevel."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

    `arguments` include `--resume`, so that one command line starts and resumes the run. `image` and
    `claim` (a persistent volume claim) are for Kubernetes.
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
        """The arguments, quoted for a shell."""
        return shlex.join(self.arguments)

    @property
    def resources(self) -> dict[str, float]:
        """Custom resources of a Ray worker, from `options`."""
        return {name: float(value) for name, value in self.options.items()}

    @property
    def quoted(self) -> list[str]:
        """The arguments, quoted for YAML and Python."""
        return [json.dumps(argument) for argument in self.arguments]


def render(job: Job) -> str:
    """Return the text of the job file."""
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
