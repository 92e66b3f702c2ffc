"""Where a run is written, and who else is told of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ftlevel.config.section import NewDirectory, Section


def _split_trackers(value: Any) -> Any:
    """Read `wandb,tensorboard` as two, `none` as no tracker."""
    if isinstance(value, str):
        value = [name for name in re.split(r"[\s,]+", value.strip().lower()) if name]
    if isinstance(value, list | tuple):
        if "all" in value:
            raise ValueError("all is whatever is installed. Name the trackers: wandb,tensorboard")
        if value == ["none"]:
            return ()
        return tuple(dict.fromkeys(value))
    return value


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(_split_trackers),
]


class OutputConfig(Section):
    """Where the run is written."""

    dir: NewDirectory | None = Field(
        None, description="Run directory; the default is a new one under runs/."
    )
    overwrite: bool = Field(False, description="Replace a run directory that exists.")
    resume: bool = Field(
        False, description="Go on from the newest whole checkpoint of the run directory."
    )
    allow_change: tuple[str, ...] = Field(
        (),
        description="A field that may be another than when the run began, by the name that "
        "--resume gives it; the change is kept in summary.json. Repeatable.",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[^/\\]+$",
        description="What the run is called: its directory under runs/ without an output "
        "directory, and its name in the experiment trackers.",
    )
    report_to: Trackers = Field(
        (),
        description="Experiment trackers that are sent the metrics, with commas between: "
        "tensorboard, wandb, mlflow, trackio; none is the default. Files are under the run.",
    )
    tracker_project: str | None = Field(
        None,
        min_length=1,
        description="Project (mlflow: experiment) of the run in those trackers; the default is "
        "that of their environment variable, else ftlevel.",
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Upload what was trained, with its card, to this repository of the Hugging "
        "Face Hub when the run is done and proved.",
    )
    hub_private: bool = Field(False, description="Make that repository a private one.")
