"""Hyperparameter search with Optuna for `compare`, and running a function in a subprocess.

TPE samples trials, each in its own process; Hyperband prunes them after 1, 3 and 9 evaluations. A
study is a database that survives kills and can be shared by processes on several machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.config.methods import SPECS
from ftlevel.errors import (
    ConfigError,
    FtlevelError,
    Interrupted,
    RunError,
    did_you_mean,
    is_out_of_memory,
    join_names,
)
from ftlevel.events import NullListener
from ftlevel.extras.compare.comparison import ranking_metric
from ftlevel.training.best import is_greater_better

if TYPE_CHECKING:
    import optuna


_MAX_MESSAGE = 300  # characters


class StopWithParent(TrainerCallback):
    """Callback that stops a run, and saves a checkpoint, once the parent process is gone."""

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers calls it so
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Stop the run if the parent process is gone."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            signal.raise_signal(signal.SIGTERM)


def run_in_subprocess(prepare: Callable[[], Any], function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` in a new process, after `prepare()`, and return the result.

    `function` must be defined in a module; args and result must be picklable. On Ctrl-C, the
    process gets SIGTERM.

    Raises:
        RunError: `function` failed, or the process died.
        Interrupted: the process was interrupted.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # no imports from the current directory
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # imports once, before any thread starts
        context.set_forkserver_preload([prepare.__module__, function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process: Any = context.Process(target=_child, args=(sender, prepare, function, args))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        status, result = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(_format_exit(process.exitcode)) from None
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    finally:
        receiver.close()
    process.join()
    if status == "interrupted":
        raise Interrupted(result)
    if status == "failed":
        raise RunError(result)
    return result


def _format_exit(code: int | None) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "its process was killed, as the kernel does when memory runs out."
    return f"its process exited with code {code} and no message."


def _child(
    sender: Connection, prepare: Callable[[], Any], function: Callable[..., Any], args: Any
) -> None:
    if hasattr(os, "setsid"):  # Ctrl-C reaches the parent alone, which passes it on
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    try:
        message = ("done", function(*args))
    except Interrupted as error:
        message = ("interrupted", str(error))
    except FtlevelError as error:
        message = ("failed", str(error))
    except Exception as error:  # noqa: BLE001 - any failure is reported, and other runs continue
        prefix = "out of memory" if is_out_of_memory(error) else type(error).__name__
        message = ("failed", f"{prefix}: {' '.join(str(error).split())[:_MAX_MESSAGE]}")
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        sender.send(message)


DATABASE = "search.db"
EVALUATIONS = 9  # per trial: Hyperband with factor 3 prunes after 1, 3 and 9
_WAIT_FOR_LOCK = 100  # seconds, of SQLite
_ATTEMPTS, _RETRY_SECONDS = 20, 0.2  # to create a database at the same time as other processes
_ALIVE, _GIVEN_UP = 20, 120  # seconds: heartbeat interval, and grace period of a trial
_MAX_FAILURES = 3
_REASON, _WITHDRAWN = "reason", "withdrawn"

_RATE = "lr"
HYPERPARAMETERS: dict[str, tuple[str, ...]] = {
    _RATE: ("train.learning_rate",),
    "r": ("method.r",),
    "alpha": ("method.lora_alpha",),
    "dropout": ("method.lora_dropout", "method.adapter_dropout"),
    "weight-decay": ("train.weight_decay",),
}
"""Configuration fields of each hyperparameter; a method has at most one of them."""

_RANKS, _ALPHAS = (2, 4, 8, 16, 32, 64), (4.0, 8.0, 16.0, 32.0, 64.0)
_RATE_FACTOR = 10.0  # range around the default learning rate
_MAX_VALUES = {"dropout": 0.2, "weight-decay": 0.1}


@dataclass(frozen=True)
class Study:
    """Hyperparameter search for one method.

    Attributes:
        name: name in the database, which identifies the configuration.
        storage: database URL.
        fields: hyperparameter → configuration field.
        rate: default learning rate.
    """

    name: str
    storage: str
    fields: Mapping[str, str]
    rate: float
    metric: str
    direction: Literal["minimize", "maximize"]
    trials: int

    def load(self) -> optuna.Study:
        """Load the study from its database, or create it."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(
            storage=_open_storage(self.storage),
            study_name=self.name,
            direction=self.direction,
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(),  # with a seed, processes would sample alike
            pruner=optuna.pruners.HyperbandPruner(1, EVALUATIONS, 3),
        )


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open the database at `url`, or create it, also if other processes create it now.

    Optuna 4 creates tables without a lock. If several processes do so at once, all but one may
    fail because a table or its version exists; another attempt then finds both.
    """
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    connect_args = {"timeout": _WAIT_FOR_LOCK} if url.startswith("sqlite") else {}
    attempts = _ATTEMPTS
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    url,
                    engine_kwargs={"connect_args": connect_args},
                    heartbeat_interval=_ALIVE,
                    grace_period=_GIVEN_UP,
                )
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            is_created = isinstance(error, IntegrityError) or "already exists" in str(error)
            attempts -= 1
            if not is_created or not attempts:
                raise
        time.sleep(_RETRY_SECONDS)


class _StudyComplete(Exception):
    pass


def check_search(names: tuple[str, ...], storage: str | None) -> list[str]:
    """Returns error messages for unknown hyperparameter `names` or an invalid `storage` URL."""
    problems = [
        f"--search: {name!r} is not a setting that can be searched. Expected some of "
        f"{join_names(HYPERPARAMETERS)}.{did_you_mean(name, HYPERPARAMETERS)}"
        for name in names
        if name not in HYPERPARAMETERS
    ]
    if names and not find_spec("optuna"):
        problems.append(
            "--search needs the package optuna, which is not installed. "
            'pip install "ftlevel[search]", or drop it.'
        )
    elif storage is not None and "://" not in storage:
        problems.append(
            f"--study {storage}: expected a database URL, as sqlite:///search.db or "
            "postgresql://user@host/name."
        )
    return problems


def plan_study(
    word: str, config: TrainConfig, state: Mapping[str, Any], dry_run: Mapping[str, Any], path: Path
) -> Study | None:
    """Returns the study of method `word`; None if the method has no hyperparameter to search.

    `state` is that of compare.json, `dry_run` a dry run's summary; the database is in `path`.
    """
    names = SPECS[config.method.kind].model_fields
    fields = {
        name: field
        for name in state["search"]
        for field in HYPERPARAMETERS[name]
        if field.startswith("train.") or field.removeprefix("method.") in names
    }
    if not fields:
        return None
    key = json.dumps([word, state["config"], state["budget"], state["search"]], sort_keys=True)
    metric = ranking_metric(config.train, dry_run["config"]["task"], dry_run["headline"])
    return Study(
        f"ftlevel-{word}-{hashlib.sha256(key.encode()).hexdigest()[:12]}",
        state["study"] or f"sqlite:///{(path / DATABASE).resolve()}",
        fields,
        dry_run["config"]["train"]["learning_rate"],
        metric,
        "maximize" if is_greater_better(config.train, metric) else "minimize",
        state["trials"],
    )


def search(
    study: Study, config: TrainConfig, path: Path, prepare: Callable[[], Any]
) -> dict[str, Any]:
    """Run the remaining trials of `study`; return the best values and all trials.

    A trial's files are in `path` while the trial runs. Each trial has its own process, in which
    `prepare` is called first.

    Raises:
        RunError: no trial finished, or too many failed.
    """
    result, failed = study.load(), 0
    while True:
        states = [trial.state.name for trial in result.get_trials(deepcopy=False)]
        running = states.count("RUNNING")
        if states.count("COMPLETE") + states.count("PRUNED") + running < study.trials:
            try:
                run_in_subprocess(prepare, _run_trial, study, config, path)
            except RunError as error:
                failed += 1
                if failed == _MAX_FAILURES:
                    raise RunError(f"{failed} trials failed, the last with: {error}") from error
        elif running:  # of another process
            time.sleep(1)
            _fail_stale_trials(result)
        else:
            break
    return _to_dict(result, study)


def _fail_stale_trials(result: optuna.Study) -> None:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(result)


def _to_dict(result: optuna.Study, study: Study) -> dict[str, Any]:
    """Returns the best values of a study and all trials; raises RunError if none finished."""
    trials = [
        t
        for t in result.get_trials(deepcopy=False)
        if t.state.is_finished() and _WITHDRAWN not in t.user_attrs
    ]
    if not any(t.state.name == "COMPLETE" for t in trials):
        reasons = [t.user_attrs[_REASON] for t in trials if _REASON in t.user_attrs]
        raise RunError(f"no trial of its search finished. {' '.join(reasons[-1:])}".strip())
    seconds = [t.duration.total_seconds() for t in trials if t.duration is not None]
    best = result.best_trial
    return {
        "values": {study.fields[name]: value for name, value in best.params.items()},
        "metric": study.metric,
        "best": best.value,
        "trials": len(trials),
        "pruned": sum(t.state.name == "PRUNED" for t in trials),
        "seconds": sum(seconds),
        "study": study.storage,
        "name": study.name,
        "history": [
            {
                "number": t.number,
                "value": t.value,
                "state": t.state.name.lower(),
                "params": dict(t.params),
            }
            for t in trials
        ],
    }


def _run_trial(study: Study, config: TrainConfig, path: Path) -> None:
    result = study.load()

    def run(trial: optuna.Trial) -> float:
        previous = [t for t in result.get_trials(deepcopy=False) if t.number < trial.number]
        if sum(t.state.name != "FAIL" for t in previous) >= study.trials:
            trial.set_user_attr(_WITHDRAWN, True)
            raise _StudyComplete
        return _objective(trial, study, config, path)

    result.optimize(run, n_trials=1, catch=_StudyComplete)


def _objective(trial: optuna.Trial, study: Study, config: TrainConfig, path: Path) -> float:
    import optuna

    values: dict[str, Any] = {}
    for name, field in study.fields.items():
        values[field] = _sample(trial, name, study.rate)
    run = path / "search" / f"{study.name}-{trial.number}"
    config = with_values(config, values)
    output = config.output.model_copy(update={"dir": run, "resume": False, "report_to": ()})
    config = config.with_sections(output=output)
    try:
        callbacks = [StopWithParent(), _PruningCallback(trial, study.metric)]
        result = train(config, callbacks=callbacks, listener=NullListener())
    except (ConfigError, RunError) as error:  # values that do not fit, or a non-finite loss
        trial.set_user_attr(_REASON, str(error))
        raise optuna.TrialPruned from error
    finally:
        shutil.rmtree(run, ignore_errors=True)
    metrics = result.summary["metrics"]
    if study.metric not in metrics:
        raise ConfigError(f"it has no {study.metric}: {', '.join(metrics)}")
    if not math.isfinite(metrics[study.metric]):
        raise RunError(f"its {study.metric} is {metrics[study.metric]}")
    return float(metrics[study.metric])


def _sample(trial: optuna.Trial, name: str, rate: float) -> float:
    if name == _RATE:
        low, high = rate / _RATE_FACTOR, min(rate * _RATE_FACTOR, 1.0)  # what train accepts
        return trial.suggest_float(name, low, high, log=True)
    if name in _MAX_VALUES:
        return trial.suggest_float(name, 0.0, _MAX_VALUES[name], step=_MAX_VALUES[name] / 4)
    return trial.suggest_categorical(name, _RANKS if name == "r" else _ALPHAS)


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Returns `config` with the fields in `values`, such as `train.learning_rate`, replaced."""
    sections: dict[str, Any] = {}
    for field, value in values.items():
        section, name = field.split(".")
        before = sections.get(section, getattr(config, section))
        sections[section] = before.model_copy(update={name: value})
    return config.with_sections(**sections)


class _PruningCallback(TrainerCallback):
    """Evaluates nine times, reports each metric to the study, and stops the trial if pruned."""

    def __init__(self, trial: optuna.Trial, metric_name: str) -> None:
        self._trial = trial
        self._metric = f"eval_{metric_name}"
        self._seen = 0

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers calls it so
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Request an evaluation after each ninth of the steps."""
        interval = max(1, math.ceil(state.max_steps / EVALUATIONS))
        if state.global_step % interval == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report the metric and prune the trial if the study requests it."""
        import optuna

        if metrics is None or self._metric not in metrics:
            return
        self._seen += 1
        self._trial.report(metrics[self._metric], self._seen)
        if self._trial.should_prune():
            raise optuna.TrialPruned
