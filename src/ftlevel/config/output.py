"""Where a run is written, and who else is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ftlevel.config.section import Section


class OutputConfig(Section):
    """Where the run is written."""

    dir: Path | None = Field(
        None, description="Run directory; the default is a new one under runs/."
    )
    overwrite: bool = Field(False, description="Replace a run directory that exists.")
    resume: bool = Field(
        False, description="Go on from the newest whole checkpoint of the run directory."
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[^/\\]+$",
        description="What the run is called: its directory under runs/ without an output "
        "directory, and its name in the experiment tracker.",
    )
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none", description="Experiment tracker that is sent the metrics."
    )
