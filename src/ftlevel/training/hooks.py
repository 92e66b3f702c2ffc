"""`TrainingHooks`: what a task changes in training, estimates and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.evaluation.scoring import Evaluator
from ftlevel.extensions import load
from ftlevel.fast.step_collator import StepCollator
from ftlevel.trained.resolve import ReferenceModel, resolve_reference

if TYPE_CHECKING:
    from ftlevel.config.section import Choice
    from ftlevel.events import Listener
    from ftlevel.tasks import BaseTask
    from ftlevel.trained.model_ref import LoadedModel, ModelRef
    from ftlevel.training.forecast.memory import StepBatch
    from ftlevel.training.forecast.seconds import Gpu, TimeForecast
    from ftlevel.training.model import PreparedModel
    from ftlevel.training.plan.run import Run
    from ftlevel.training.processes import Processes


class EvaluationHooks:
    """Base class of what a task changes in `ftlevel evaluate`; the defaults change nothing.

    Attributes:
        choices: lines to print.
        stage: what `create_evaluator` does, if it takes time.
        evaluator: class of the evaluator.
    """

    choices: Sequence[Choice] = ()
    stage: str = ""

    def __init__(self, evaluator: type[Evaluator] = Evaluator) -> None:
        self.evaluator = evaluator

    def create_evaluator(
        self, trained: LoadedModel, eval_rows: Any, seed: int, settings: Mapping[str, Any]
    ) -> Evaluator:
        """Create the evaluator of `trained` from `settings`, the arguments of `evaluator`."""
        return self.evaluator(**settings)


class TrainingHooks:
    """Base class of what a task changes in a run; the defaults change nothing.

    `BaseTask.hooks` names the class of a task.

    Attributes:
        logs_each_step: whether every step is logged by default.
        needs_order: whether the Trainer needs the sampler of the rows, even if it is random.
        collator: class that collates the rows of a step into micro-batches.
        evaluator: class that scores the validation rows.
    """

    logs_each_step: ClassVar[bool] = False
    needs_order: ClassVar[bool] = False
    collator: ClassVar[type[StepCollator]] = StepCollator
    evaluator: ClassVar[type[Evaluator]] = Evaluator

    # ---- before training

    def open_run(self, run: Run) -> Run:
        """Returns the run with `Run.resources` set, without loading weights."""
        return run

    def check_run(self, run: Run) -> None:
        """Raise ConfigError if the run cannot start, e.g. because a server does not answer."""

    def get_auxiliary_names(self, run: Run) -> Mapping[str, str | None]:
        """Returns dotted field → name of a model that is used but not trained; None if unset."""
        return {}

    def resolve_auxiliary(self, run: Run, flag: str, name: str) -> ReferenceModel:
        """Resolve the model `name` of `flag`, such as `--teacher`; loads no weights."""
        model = run.model
        return resolve_reference(flag, name, model.kind, model.tokenizer, model.device)

    def get_identity(self, run: Run) -> Mapping[str, Any]:
        """Returns dotted field → value that a resumed run must have, if not the configured."""
        return {}

    def preview(self, run: Run) -> list[Choice]:
        """Returns lines that `ftlevel preview` shows after the rows."""
        return []

    # ---- training

    def with_auxiliary_outputs(self, run: Run, listener: Listener, processes: Processes) -> Run:
        """Returns the run with outputs of the auxiliary models in its rows."""
        return run

    def create_order(self, run: Run) -> Any:
        """Returns the sampler of the training rows; None for the configured one."""
        return None

    def with_initial_outputs(
        self, run: Run, model: PreparedModel, listener: Listener, processes: Processes
    ) -> Run:
        """Returns the run with outputs of its own untrained `model` in its rows."""
        return run

    def create_sampler(self, run: Run, model: PreparedModel, listener: Listener | None) -> Any:
        """Returns what trainer and evaluator share to sample training rows; None for most tasks.

        Without `listener`, it is for single steps, and calls no teacher.
        """
        return None

    def select_trainer(
        self, run: Run, sampler: Any, rows: Any, order: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        """Returns the class of the Trainer, further arguments, and the sampler of its `rows`.

        The class is None for `FtlevelTrainer`.
        """
        return None, {}, order

    def create_evaluator(self, run: Run, sampler: Any, settings: Mapping[str, Any]) -> Evaluator:
        """Create the evaluator of the validation rows from the arguments of `Evaluator`."""
        return self.evaluator(**settings)

    def check_trainer(self, trainer: Any, rows: Sequence[Any], listener: Listener) -> None:
        """Raise RunError if training `trainer` on `rows` would fail."""

    def explain_no_effect(self, run: Run, records: Sequence[Mapping[str, Any]]) -> str:
        """Returns why training changed nothing, and advice; "" if unknown."""
        return ""

    def save_files(self, run: Run, directory: Path) -> None:
        """Save further files next to the weights in `directory`."""

    def describe(
        self, run: Run, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns sections of summary.json, and notes for the user; `records` is the log."""
        return {}, []

    def get_warnings(self, run: Run, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns warnings about a finished run with the log `records`."""
        return []

    # ---- estimates

    def with_targets(self, run: Run, rows: list[Any]) -> list[Any]:
        """Returns the rows of a step on `rows`, if they differ."""
        return rows

    def as_checked(self, run: Run) -> Run:
        """Returns the run on the rows by which the fast step is checked before training."""
        return run

    def add_memory(self, run: Run, peaks: dict[str, dict[str, float]], batch: StepBatch) -> None:
        """Add categories and phases to `peaks` (phase → category → bytes; modified).

        `batch` is the largest micro-batch.
        """

    def estimate_time(
        self, run: Run, gpu: Gpu, operations: float, weights: int
    ) -> TimeForecast | None:
        """Returns the time of a run on `gpu`; None for the usual estimate.

        `operations` are FLOPs per token, `weights` is the number of bytes of the weights.
        """
        return None

    # ---- evaluate

    def evaluation(self, ref: ModelRef, options: Mapping[str, Any]) -> EvaluationHooks:
        """Returns what changes in `ftlevel evaluate`; raises ConfigError for invalid `options`.

        `options` are those that extensions added, and `name`, the evaluated run or model.
        """
        return EvaluationHooks(self.evaluator)


def hooks_of(task: BaseTask) -> TrainingHooks:
    """Returns the hooks of `task`."""
    hooks: TrainingHooks = load(task.hooks)()
    return hooks
