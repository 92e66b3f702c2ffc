"""Callbacks for progress, signals and the current epoch, and experiment trackers.

Trackers are TensorBoard, Weights & Biases, MLflow and Trackio. Nothing leaves the machine unless
the user has logged in to a tracker or set environment variables for it. ftlevel passes no tokens.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts.files import load_json, write_json
from ftlevel.config.reading import flatten
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import MaskedRows
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.samplers import EpochSampler
from ftlevel.errors import RunError
from ftlevel.events import Listener
from ftlevel.models.upstream.libraries import shared_order
from ftlevel.safe_io import mask_passwords
from ftlevel.training.processes import Processes

_PROGRESS = "progress.json"  # in a checkpoint


class Report(TrainerCallback):
    """Callback that reports progress to `listener` (the terminal), metrics.jsonl and trackers.

    Attributes:
        records: all log records, including those before a resume.
        tokens: tokens of all processes since the start or a resume; None until training ends.
        first_step_at: start of the first step, by `time.perf_counter`.
        first_step_cpu_s: CPU seconds of all threads until the first step.
        train_s: seconds since the first step, without evaluation and saving.
    """

    def __init__(
        self,
        listener: Listener,
        write: Callable[[Mapping[str, Any]], None],
        tokens_seen: Callable[[], int],
        memory: Callable[[], int],
    ) -> None:
        self.listener = listener
        self.writers = [write]
        self.tokens_seen = tokens_seen
        self.memory = memory
        self.records: list[dict[str, Any]] = []
        self.tokens: int | None = None
        self.first_step_at: float | None = None
        self.first_step_cpu_s = 0.0
        self.train_s = 0.0
        self._before = dict.fromkeys(("tokens", "elapsed_s", "train_s"), 0)  # before a resume
        self._seen_at: float | None = None  # None in a pause

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the planned number of steps to `listener`."""
        self.listener.begin(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restart the clock of `train_s` after a pause, and record when the first step began."""
        if self._seen_at is None:
            self._seen_at = time.perf_counter()
        if self.first_step_at is None:
            self.first_step_at = self._seen_at
            self.first_step_cpu_s = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the step's time to `train_s`, and report the step to `listener`."""
        self._add_time()
        self.listener.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a log record: step, epoch, loss, rate, gradient norm, tokens, seconds and memory.

        `elapsed_s` includes evaluation and saving, `train_s` does not.
        """
        logs = dict(logs or {})
        if "train_runtime" in logs:  # Trainer's own summary; ours has more
            return
        if not any(name.startswith("eval_") for name in logs):
            self._add_time()  # reading the loss synchronized the GPU
        record = {
            "step": state.global_step,
            **logs,
            **self._totals(),
            "memory_bytes": self.memory(),
        }
        self.records.append(record)
        for write in self.writers:
            write(record)
        self.listener.log(record)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Pause `train_s` after an evaluation or a saved checkpoint, until the next step."""
        self._seen_at = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write tokens and seconds into the checkpoint, and pause `train_s` until the next step."""
        totals = self._totals()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            write_json(checkpoint / _PROGRESS, totals)
        self._seen_at = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add up the tokens of all processes."""
        self.tokens = self.tokens_seen()

    def resume(self, checkpoint: Path) -> None:
        """Continue the counts of tokens and seconds from `checkpoint`."""
        self._before |= load_json(checkpoint / _PROGRESS)

    def _totals(self) -> dict[str, Any]:
        start = self.first_step_at or time.perf_counter()
        tokens = self.tokens_seen() if self.tokens is None else self.tokens
        now = {"tokens": tokens, "elapsed_s": time.perf_counter() - start}
        now["train_s"] = self.train_s
        return {name: round(value + self._before[name], 3) for name, value in now.items()}

    def _add_time(self) -> None:
        if self._seen_at is not None:
            now = time.perf_counter()
            self.train_s += now - self._seen_at
            self._seen_at = now


class Interrupt(TrainerCallback):
    """Callback that saves a checkpoint after the step and stops, on Ctrl-C, SIGTERM or SIGHUP.

    On SIGUSR1, which SLURM sends before the end of a job, training continues after the checkpoint.
    A second signal ends a run of one process at once. Runs of several ignore it, because launchers
    forward signals that the terminal has already sent. Use as a context manager around training.

    Attributes:
        signal_name: name of the received signal; empty if none.
        exit_code: 128 + signal number.
        has_stopped: whether a signal ended the run.
    """

    _SAVE, _STOP = 1, 2

    def __init__(self, processes: Processes) -> None:
        self.signal_name = ""
        self.exit_code = 128 + signal.SIGINT
        self._action = 0
        self.has_stopped = False
        self._processes = processes
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no some
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN  # by nohup
            ):
                continue
            try:
                self._handlers[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self._action = max(self._action, self._SAVE)
            return
        if self.signal_name and self._processes.count == 1:
            handler = self._handlers.get(number)
            if callable(handler):
                handler(number, frame)
            raise KeyboardInterrupt
        self.signal_name, self.exit_code, self._action = name, 128 + number, self._STOP

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save a checkpoint if any process received a signal, and stop unless it is SIGUSR1."""
        # Use the agreed value, not later signals, so that all stop after the same step.
        action = self._processes.max(self._action)
        if action and state.global_step < state.max_steps:
            control.should_save = True
            self._action = 0
        if action == self._STOP and state.global_step < state.max_steps:
            self.signal_name = self.signal_name or "of another process"
            self.has_stopped = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """After a stop within an epoch, skip the evaluation that would be due at its end."""
        if self.has_stopped and not (state.epoch or 0.0).is_integer():
            control.should_evaluate = control.should_save = False
        return control


class UpdateSchedule(TrainerCallback):
    """Callback that on resume sets the configured intervals and rates, not those of the checkpoint.

    Else an extended run would start with the old schedule's rate, such as 0 after linear decay.
    `past` are the log records up to the checkpoint.
    """

    def __init__(self, past: Sequence[Mapping[str, Any]] = ()) -> None:
        self._past = past

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set logging, evaluation and save intervals, and learning rates, if the run resumes."""
        if state.global_step == 0:
            return
        state.compute_steps(args, state.max_steps)
        if not hasattr(lr_scheduler, "lr_lambdas"):
            step = state.global_step
            losses = [r["eval_loss"] for r in self._past if r["step"] == step and "eval_loss" in r]
            known = any(r["step"] == step and "eval_loss" in r for r in state.log_history)
            if losses and not known:  # the checkpoint is older than the evaluation of its step
                lr_scheduler.step(losses[-1])
            return
        lr_scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        values = [
            base * share(lr_scheduler.last_epoch)
            for base, share in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, values, strict=True):
            group["lr"] = rate
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "_last_lr": values})  # is logged


class SetEpoch(TrainerCallback):
    """Callback that sets the current epoch, which seeds token masks and the order of the rows."""

    def __init__(self, rows: Sequence[Encoded], order: Any) -> None:
        self.rows = rows
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the epoch of rows and sampler before Trainer reads the first row."""
        if isinstance(self.rows, MaskedRows):
            self.rows.epoch = int(state.epoch or 0)
        if isinstance(self.order, EpochSampler):
            self.order.epoch = int(state.epoch or 0)
        elif isinstance(self.order, shared_order()):
            self.order.set_epoch(int(state.epoch or 0))


_PROJECT = "ftlevel"
_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")


@dataclass(frozen=True)
class RunInfo:
    """Description of a run for trackers; `first_step` is the step from which it resumes, or 0."""

    path: Path
    name: str
    project: str | None
    config: Mapping[str, Any]
    first_step: int = 0

    def project_or(self, variable: str) -> str:
        """Returns the tracker project: configured, or in environment `variable`, or `ftlevel`."""
        return self.project or os.environ.get(variable) or _PROJECT


@dataclass(frozen=True)
class Tracker:
    """A started experiment tracker.

    Attributes:
        location: path or URL of the tracker's data, shown to the user.
        log: function called with metrics and their step.
        close: function that ends the run in the tracker.
    """

    location: str
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


@contextlib.contextmanager
def tracking(
    names: tuple[str, ...], info: RunInfo, listener: Listener
) -> Iterator[list[Callable[[Mapping[str, Any]], None]]]:
    """Start the trackers `names` in a `with` block; yields a function for each that logs a record.

    RunError if a tracker cannot start; one that fails later is disabled, with a warning.
    """
    environment, added = set(os.environ), set[str]()
    trackers: dict[str, Tracker] = {}
    try:
        for name in names:
            try:
                trackers[name] = _BEGIN[name](info)
            except Exception as error:
                raise RunError(f"--report-to {name} cannot be started: {error}") from error
            finally:
                added |= os.environ.keys() - environment
        if trackers:
            locations = [Choice(n, mask_passwords(t.location)) for n, t in trackers.items()]
            listener.choices("trackers", locations)
        yield [_write_to(name, tracker, listener) for name, tracker in trackers.items()]
    finally:
        for name, tracker in trackers.items():
            with _or_warn(name, listener):
                tracker.close()
        for variable in added:  # set by wandb for its helper
            os.environ.pop(variable, None)


def _write_to(
    name: str, tracker: Tracker, listener: Listener
) -> Callable[[Mapping[str, Any]], None]:
    """Returns a function that sends log records to `tracker`; after a failure, it does nothing."""
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
    """Convert exceptions of tracker `name` in the `with` block into warnings to `listener`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a tracker's own, and no reason to lose a run
        listener.warn(f"{name} failed, and is disabled: {error}")


def name_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numeric values of a log record under transformers' names, e.g. `train/loss`."""
    values = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in values.items()
    }


def _begin_tensorboard(info: RunInfo) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    path = info.path / "tensorboard"
    writer = SummaryWriter(str(path), purge_step=info.first_step + 1 if info.first_step else None)
    writer.add_text("config", f"```json\n{json.dumps(info.config, indent=2)}\n```")

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(f"{path}", log, writer.close)


def _begin_wandb(info: RunInfo) -> Tracker:
    import wandb

    mode = os.environ.get("WANDB_MODE")
    is_online = bool(mode) or wandb.login(prompt=False, verify=False)
    tracker = wandb.init(
        project=info.project_or("WANDB_PROJECT"),
        name=info.name,
        dir=str(info.path),
        mode=None if is_online else "offline",
        config=dict(info.config),
        settings=wandb.Settings(silent=True, console="off"),
    )
    if tracker.offline:
        prefix = "" if mode else "not logged in: "
        path = Path(tracker.dir).parent
        location = f"{path} ({prefix}`wandb sync {path}` sends it)"
    else:
        location = str(tracker.url)
    return Tracker(location, lambda metrics, step: tracker.log(metrics, step=step), tracker.finish)


def _begin_mlflow(info: RunInfo) -> Tracker:
    # Disable telemetry, unless the user has configured it.
    if not any(name in os.environ for name in _TELEMETRY):
        os.environ[_TELEMETRY[0]] = "true"
    import mlflow
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and mlflow.is_tracking_uri_set():
        uri = mlflow.get_tracking_uri()
    local = info.path / "mlflow"
    if not uri:
        local.mkdir(exist_ok=True)
        uri = f"sqlite:///{local.resolve() / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    project = info.project_or("MLFLOW_EXPERIMENT_NAME")
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    run_id = client.create_run(experiment_id, run_name=info.name).info.run_id
    params = [Param(k, str(v)[:500]) for k, v in flatten(info.config)]
    for start in range(0, len(params), 100):  # MLflow's limit
        client.log_batch(run_id, params=params[start : start + 100])

    def log(metrics: dict[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        client.log_batch(run_id, [Metric(k, v, now, step) for k, v in metrics.items()])

    return Tracker(uri, log, lambda: client.set_terminated(run_id))


def _begin_trackio(info: RunInfo) -> Tracker:
    import trackio

    def silence(do: Callable[[], Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return do()

    project = info.project_or("TRACKIO_PROJECT")
    tracker = silence(
        lambda: trackio.init(
            project=project, name=info.name, config=dict(info.config), resume="allow", embed=False
        )
    )
    return Tracker(
        f"project {project} (`trackio show --project {project}`)",
        lambda metrics, step: tracker.log(metrics, step=step),
        lambda: silence(trackio.finish),  # its exit handler then prints nothing
    )


_BEGIN: Mapping[str, Callable[[RunInfo], Tracker]] = {
    "tensorboard": _begin_tensorboard,
    "wandb": _begin_wandb,
    "mlflow": _begin_mlflow,
    "trackio": _begin_trackio,
}
