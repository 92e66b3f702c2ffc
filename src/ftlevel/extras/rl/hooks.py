"""What `--task rl` changes in training, estimates and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener, NullListener
from ftlevel.extras.rl.checks import (
    check_before,
    get_no_effect_cause,
    get_rollout_warnings,
    preview_rollouts,
)
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.forecast import (
    INITIAL,
    SAMPLING,
    SCORING_MODELS,
    RolloutSize,
    estimate_rl_time,
    estimate_sampling_parts,
    estimate_scoring_bytes,
    with_completions,
)
from ftlevel.extras.rl.rewards import Rewards
from ftlevel.extras.rl.rollouts import (
    RewardEvaluator,
    Rollouts,
    compute_token_logps,
    open_rewards,
    open_teacher,
    score_rows,
)
from ftlevel.extras.rl.rows import STAND_IN_TOKENS, STAND_INS, CompletionRow, TokenLogps
from ftlevel.extras.rl.server import BOUND, ServerSampler, check_server
from ftlevel.extras.rl.step import bound_of
from ftlevel.extras.rl.trainer import RepeatedSteps, RlTrainer
from ftlevel.extras.rl.trust import check_reward_files
from ftlevel.methods import METHODS
from ftlevel.models.hardware import autocast
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.forecast.memory import StepBatch
from ftlevel.training.forecast.meta_model import ADAPTER, FORWARD, PERSISTENT_PARTS, WEIGHTS
from ftlevel.training.forecast.seconds import Gpu, TimeForecast
from ftlevel.training.hooks import EvaluationHooks, TrainingHooks
from ftlevel.training.model import PreparedModel, load_training_model
from ftlevel.training.plan.run import Run
from ftlevel.training.teacher import TEACHER, iterate_batches, load_auxiliary_model


class RlHooks(TrainingHooks):
    """Hooks of `--task rl`; `Run.resources` are the run's `Rewards`, None with a teacher."""

    logs_each_step: ClassVar[bool] = True
    needs_order: ClassVar[bool] = True

    def open_run(self, run: Run) -> Run:
        """Returns the run with its rewards; raises ConfigError if they cannot score its rows."""
        if not run.config.get_section(RlConfig).reward:
            return run
        rewards = _open_rewards(run)
        held_out: Sequence[Any] = run.data.validation
        columns = [row.columns for row in held_out]
        rewards.check_rows(columns, lambda at: run.data.validation_table.where(held_out[at].row))
        return replace(run, resources=rewards)

    def check_run(self, run: Run) -> None:
        """Raise ConfigError if the server of `--rollouts` cannot be used."""
        check_server(run.config.get_section(RlConfig))

    def get_identity(self, run: Run) -> Mapping[str, Any]:
        """Returns that a server samples, whose address may change, and the rewards' fingerprint."""
        fields = {"rl.rollouts": run.config.get_section(RlConfig).rollouts is not None or None}
        if run.resources is not None:
            fields["rl.fingerprint"] = run.resources.fingerprint
        return fields

    def preview(self, run: Run) -> list[Choice]:
        """Returns lines on completions sampled for `check_groups`; [] without the check."""
        if not run.config.get_section(RlConfig).check_groups:
            return []
        model, teacher = run.model, None
        if name := run.config.distillation.teacher:
            objective: Any = run.objective
            teacher = open_teacher(
                name, objective, model.kind, model.tokenizer, model.device, model.dtype
            )
        else:
            run = replace(run, resources=_open_rewards(run))
        adapted = load_training_model(run, NullListener())
        return preview_rollouts(_create_rollouts(run, adapted.model, teacher), run.data.train)

    def create_sampler(self, run: Run, model: PreparedModel, listener: Listener | None) -> Rollouts:
        """Returns the sampler of completions, with the weights of `model` or by a server."""
        teacher = None
        if listener is not None and TEACHER in run.auxiliary:
            teacher = TeacherScorer(run.auxiliary[TEACHER], run, listener)
        url, server = run.config.get_section(RlConfig).rollouts, None
        if url is not None:
            objective: Any = run.objective
            score = partial(
                score_rows,
                model.model,
                objective,
                pad_id=run.model.pad_id,
                device=run.model.device,
                dtype=run.model.dtype,
            )
            server = ServerSampler(url, model.model, run.config.method, model.initial_state, score)
        return _create_rollouts(run, model.model, teacher, server)

    def select_trainer(
        self, run: Run, sampler: Rollouts, rows: Any, order: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        """Returns `RlTrainer`, and an order that repeats a step's rows if they serve several."""
        config = run.config.get_section(RlConfig)
        is_served = config.rollouts is not None
        bound = BOUND if is_served else bound_of(run.model.dtype, run.model.quant.kind)
        if order is not None and config.num_iterations > 1:
            order = RepeatedSteps(order, run.config.train.rows_per_step, config.num_iterations)
        return RlTrainer, {"rollouts": sampler, "prompts": rows, "bound": bound}, order

    def create_evaluator(
        self, run: Run, sampler: Rollouts, settings: Mapping[str, Any]
    ) -> Evaluator:
        """Returns the evaluator that scores sampled completions of validation rows."""
        where = run.data.validation_table.where
        rollouts = sampler.for_rows(where) if sampler is not None else None
        return RewardEvaluator(**settings, rollouts=rollouts)

    def check_trainer(self, trainer: RlTrainer, rows: Sequence[Any], listener: Listener) -> None:
        """Sample completions of some prompts before training, and show them."""
        check_before(trainer, rows, listener)

    def explain_no_effect(self, run: Run, records: Sequence[Mapping[str, Any]]) -> str:
        """Returns why the rewards gave no gradient, and advice; "" if unknown."""
        return get_no_effect_cause(run.config.get_section(RlConfig), records)

    def describe(
        self, run: Run, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns the teacher, if there is one."""
        if (teacher := run.auxiliary.get(TEACHER)) is None:
            return {}, []
        info = {"teacher": teacher.name, "fingerprint": teacher.fingerprint}
        return {"distillation": info}, []

    def get_warnings(self, run: Run, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns warnings about rewards, lengths and entropy, and about failed rewards."""
        failures = run.resources.describe_failures() if run.resources is not None else ()
        return [*get_rollout_warnings(run.config.get_section(RlConfig), records), *failures]

    def with_targets(self, run: Run, rows: list[Any]) -> list[Any]:
        """Returns synthetic completions of the prompts `rows`."""
        return list(with_completions(run, rows))

    def as_checked(self, run: Run) -> Run:
        """Returns the run on stand-ins, of which it samples none."""
        return run.with_settings(
            "rl", num_generations=STAND_INS, max_completion_length=STAND_IN_TOKENS, rollouts=""
        )

    def add_memory(self, run: Run, peaks: dict[str, dict[str, float]], batch: StepBatch) -> None:
        """Add sampling, initial weights and scoring models to `peaks` (modified)."""
        if (size := RolloutSize.of(run, batch.memory - batch.weights)) is not None:
            parts = {part: n for part, n in peaks[FORWARD].items() if part in PERSISTENT_PARTS}
            peaks[SAMPLING] = {**parts, **estimate_sampling_parts(run, size)}
        added: dict[str, float] = {}
        if run.config.get_section(RlConfig).beta:
            is_full = not METHODS[run.config.method.kind].is_adapter
            added[INITIAL] = peaks[FORWARD].get(WEIGHTS if is_full else ADAPTER, 0)
        if scoring := estimate_scoring_bytes(run):
            added[SCORING_MODELS] = scoring
        for moment in peaks.values():
            moment.update(added)

    def estimate_time(
        self, run: Run, gpu: Gpu, operations: float, weights: int
    ) -> TimeForecast | None:
        """Returns the time of sampling and training; None if a server samples."""
        size = RolloutSize.of(run, gpu.memory - weights)
        return estimate_rl_time(run, gpu, size, operations, weights) if size is not None else None

    def evaluation(self, ref: ModelRef, options: Mapping[str, Any]) -> EvaluationHooks:
        """Returns the evaluation by rewards; ConfigError for a file that only the run names."""
        objective: Any = ref.objective
        settings: RlConfig = objective.config
        if options["reward"]:
            return RewardEvaluation(settings.model_copy(update={"reward": options["reward"]}))
        if ref.run is not None:  # which may have been moved, with its rewards
            own = ref.run_config.get_section(RlConfig).reward
            settings = settings.model_copy(update={"reward": own})
        if problems := list(check_reward_files(settings.rewards, options["name"])):
            raise ConfigError(problems)
        return RewardEvaluation(settings)


def _open_rewards(run: Run) -> Rewards:
    rows, where, model = run.data.train, run.data.table.where, run.model
    config = run.config.get_section(RlConfig)
    return open_rewards(config, model.device, model.tokenizer, rows, where)


def _create_rollouts(
    run: Run, model: Any, teacher: TokenLogps | None, server: ServerSampler | None = None
) -> Rollouts:
    get_position: Callable[[int], str] = run.data.table.where
    return Rollouts(
        model,
        run.model.tokenizer,
        run.config.get_section(RlConfig),
        run.resources,
        run.config.train.order_seed,
        kind=run.model.kind,
        method=run.config.method.kind,
        device=run.model.device,
        dtype=run.model.dtype,
        get_position=get_position,
        teacher=teacher,
        server=server,
    )


@dataclass(frozen=True)
class RewardEvaluation(EvaluationHooks):
    """Evaluation of a run by the rewards in `settings`, or by its teacher."""

    settings: RlConfig

    @property
    def choices(self) -> Sequence[Choice]:  # type: ignore[override]
        """The Python files that are run."""
        return [
            Choice("reward", spec.text, "runs this Python file")
            for spec in self.settings.rewards
            if spec.kind == "function"
        ]

    def create_evaluator(
        self, trained: LoadedModel, eval_rows: Any, seed: int, settings: Mapping[str, Any]
    ) -> Evaluator:
        """Create the evaluator that samples completions from `trained`."""
        objective: Any = trained.objective
        teacher_name, rewards, teacher = objective.teacher, None, None
        if trained.ref.run is not None:  # which may have been moved, with its teacher
            teacher_name = trained.ref.run_config.distillation.teacher
        where, device = eval_rows.table.where, trained.device
        if teacher_name is None:
            rewards = open_rewards(self.settings, device, trained.tokenizer, eval_rows.rows, where)
        else:
            teacher = open_teacher(
                teacher_name, objective, trained.kind, trained.tokenizer, device, trained.dtype
            )
        rollouts = Rollouts(
            trained.model,
            trained.tokenizer,
            self.settings,
            rewards,
            seed,
            kind=trained.kind,
            method=trained.ref.card.method,
            device=device,
            dtype=trained.dtype,
            get_position=where,
            teacher=teacher,
        )
        return RewardEvaluator(**settings, rollouts=rollouts)


class TeacherScorer:
    """Computes a teacher's log-probabilities of completions; the first call loads the teacher."""

    def __init__(self, teacher: ReferenceModel, run: Run, listener: Listener) -> None:
        self.teacher = teacher
        self._run = run
        self._context = load_auxiliary_model(teacher, run, listener)
        self._loaded: tuple[Run, PreparedModel] | None = None

    def __call__(self, rows: Sequence[CompletionRow]) -> list[list[float]]:
        """Returns the teacher's log-probability of each completion token, in one list per row."""
        objective: Any = self._run.objective
        if not rows:
            return []
        self._loaded = self._loaded or self._context.__enter__()
        run, adapted = self._loaded
        head = adapted.fast.cross_entropy if adapted.fast is not None else None
        with autocast(run.model.device, run.model.dtype):
            batches = iterate_batches(run, adapted.fast, rows)
            logps = compute_token_logps(adapted.model, objective, batches, head)
        return [logps[index] for index in range(len(rows))]
