"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio.

Files are written to the run directory. Nothing leaves the machine unless the user has logged in to
a tracker or set its environment variables. Run name, project and settings are ftlevel's and contain
no token.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import OutputConfig
from ftlevel.config.section import Choice
from ftlevel.errors import RunError
from ftlevel.events import Listener

_PROJECT = "ftlevel"
_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")


@dataclass(frozen=True)
class TrackedRun:
    """Description of a run for trackers; `first_step` is the step it resumes from, or 0."""

    path: Path
    name: str
    project: str | None
    config: Mapping[str, Any]
    first_step: int = 0

    def project_or(self, variable: str) -> str:
        """Return the user's project, that of the tracker's environment variable, or `ftlevel`."""
        return self.project or os.environ.get(variable) or _PROJECT


@dataclass(frozen=True)
class Tracker:
    """A started tracker.

    Attributes:
        where: location of its data, for the screen.
        log: called with metrics and their step.
        close: ends the run in the tracker.
    """

    where: str
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def describe_run(
    output: OutputConfig,
    values: Mapping[str, Any],
    directory: RunDirectory,
    past: Sequence[Mapping[str, Any]],
) -> TrackedRun:
    """Return the description of a run for trackers; `past` are log records before a resume."""
    name, first = output.run_name or directory.path.name, past[-1]["step"] if past else 0
    return TrackedRun(directory.path, name, output.tracker_project, values, first)


@contextlib.contextmanager
def tracking(
    names: tuple[str, ...], run: TrackedRun, listener: Listener
) -> Iterator[list[Callable[[Mapping[str, Any]], None]]]:
    """Start trackers, yield a function per tracker that logs a record, and close them.

    Raises RunError if a tracker cannot be started.
    """
    environment = dict(os.environ)
    trackers: dict[str, Tracker] = {}
    try:
        for name in names:
            try:
                trackers[name] = _BEGIN[name](run)
            except Exception as error:
                raise RunError(f"--report-to {name} cannot be started: {error}") from error
        if trackers:
            listener.choices("trackers", [Choice(n, t.where) for n, t in trackers.items()])
        yield [_write_to(name, tracker, listener) for name, tracker in trackers.items()]
    finally:
        for name, tracker in trackers.items():
            with _or_warn(name, listener):
                tracker.close()
        for variable in os.environ.keys() - environment.keys():  # set by wandb for its helper
            del os.environ[variable]


def _write_to(
    name: str, tracker: Tracker, listener: Listener
) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that sends records to a tracker until the first failure."""
    failed: list[bool] = []

    def write(record: Mapping[str, Any]) -> None:
        if not failed:
            failed.append(True)
            with _or_warn(name, listener):
                tracker.log(name_metrics(record), int(record["step"]))
                failed.clear()

    return write


@contextlib.contextmanager
def _or_warn(name: str, listener: Listener) -> Iterator[None]:
    """Warn if a tracker fails; the run continues, and metrics.jsonl is complete."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a tracker's own, and no reason to lose a run
        listener.warn(f"{name} failed, and is disabled: {error}")


def name_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric values of a record under transformers' names, such as `train/loss`."""
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in numbers.items()
    }


def _begin_tensorboard(run: TrackedRun) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    path = run.path / "tensorboard"
    writer = SummaryWriter(str(path), purge_step=run.first_step + 1 if run.first_step else None)
    writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```")

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(f"{path}", log, writer.close)


def _begin_wandb(run: TrackedRun) -> Tracker:
    import wandb

    mode = os.environ.get("WANDB_MODE")
    is_online = bool(mode) or wandb.login(prompt=False, verify=False)
    wandb_run = wandb.init(
        project=run.project_or("WANDB_PROJECT"),
        name=run.name,
        dir=str(run.path),
        mode=None if is_online else "offline",
        config=dict(run.config),
        settings=wandb.Settings(silent=True, console="off"),
    )
    if wandb_run.offline:
        reason = "" if mode else "not logged in: "
        directory = Path(wandb_run.dir).parent
        where = f"{directory} ({reason}`wandb sync {directory}` sends it)"
    else:
        where = str(wandb_run.url)
    return Tracker(where, lambda metrics, step: wandb_run.log(metrics, step=step), wandb_run.finish)


def _begin_mlflow(run: TrackedRun) -> Tracker:
    # Disable telemetry, unless the user has configured it.
    if not any(name in os.environ for name in _TELEMETRY):
        os.environ[_TELEMETRY[0]] = "true"
    import mlflow
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if not address and mlflow.is_tracking_uri_set():
        address = mlflow.get_tracking_uri()
    local = run.path / "mlflow"
    if not address:
        local.mkdir(exist_ok=True)
        address = f"sqlite:///{local.resolve() / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=address)
    project = run.project_or("MLFLOW_EXPERIMENT_NAME")
    experiment = client.get_experiment_by_name(project)
    number = experiment.experiment_id if experiment else client.create_experiment(project)
    run_id = client.create_run(number, run_name=run.name).info.run_id
    parameters = [Param(k, str(v)[:500]) for k, v in _flat(run.config)]
    for start in range(0, len(parameters), 100):  # MLflow's limit
        client.log_batch(run_id, params=parameters[start : start + 100])

    def log(metrics: dict[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        client.log_batch(run_id, [Metric(k, v, now, step) for k, v in metrics.items()])

    return Tracker(address, log, lambda: client.set_terminated(run_id))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _begin_trackio(run: TrackedRun) -> Tracker:
    import trackio

    def quietly(do: Callable[[], Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return do()

    project = run.project_or("TRACKIO_PROJECT")
    trackio_run = quietly(
        lambda: trackio.init(
            project=project, name=run.name, config=dict(run.config), resume="allow", embed=False
        )
    )
    return Tracker(
        f"project {project} (`trackio show --project {project}`)",
        lambda metrics, step: trackio_run.log(metrics, step=step),
        lambda: quietly(trackio.finish),  # its exit handler then prints nothing
    )


_BEGIN: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _begin_tensorboard,
    "wandb": _begin_wandb,
    "mlflow": _begin_mlflow,
    "trackio": _begin_trackio,
}
