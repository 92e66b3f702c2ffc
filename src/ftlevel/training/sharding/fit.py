"""What cannot be shared out over processes, said before weights load."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS
from ftlevel.task import LikelihoodObjective
from ftlevel.training.plan.plan import Plan


def check_can_shard(config: TrainConfig, plan: Plan, count: int) -> None:
    """Refuse `--shard` where the run could not be what was asked for.

    Args:
        config: the whole configuration.
        plan: its plan.
        count: of processes; None where it is not known yet.

    Raises:
        ConfigError: naming each reason.
    """
    if config.train.shard == "none":
        return
    asked, method, problems = f"--shard {config.train.shard}", config.method, []
    kind = METHODS[method.kind]
    if count == 1:
        problems.append(
            f"{asked}: one process has the whole model. Start several: --num-processes N, or a "
            "launcher such as torchrun."
        )
    if kind.start is not None and kind.start.rewrites_base(method):
        problems.append(
            f"{asked} cannot be used with a start that is taken out of the base's weights, which "
            "no process has whole when the adapter is saved. Use the default start."
        )
    if kind.why_not_continued:
        problems.append(
            f"{asked} cannot be used with --method {method.kind} yet: what it saves has other "
            "shapes than what it trains, and is proven on a whole base. Use --method lora."
        )
    if plan.model.quant.kind not in ("none", "4bit"):
        problems.append(
            f"{asked} cannot be used with --quant {plan.model.quant.kind}, whose weights cannot be "
            "cut by rows alone. Use --quant 4bit, or none."
        )
    if isinstance(plan.objective, LikelihoodObjective):
        problems.append(
            f"{asked} cannot be used with --task preference yet: a reference that one process has "
            "kept and another has not would leave them waiting for one another. Use --shard none."
        )
    if config.distillation.teacher is not None:
        problems.append(
            f"{asked} cannot be used with --teacher yet, which every process would hold whole. Use "
            "--shard none."
        )
    if kind.build is None:
        problems += _problems_of_full(config, plan, asked)
    if problems:
        raise ConfigError(problems)


def _problems_of_full(config: TrainConfig, plan: Plan, asked: str) -> list[str]:
    """Return what cannot be had where the trained weights themselves are shared out."""
    problems = []
    if plan.model.dtype == "float16":
        problems.append(
            f"{asked} cannot be used with --method full and --dtype float16: a scale would be "
            "halved where one process overflows, and not in the others. Use --dtype bfloat16."
        )
    if plan.best is not None and plan.best.loads:
        best = "--load-best-model-at-end"
        if not config.train.load_best_model_at_end:
            best = f"--metric-for-best-model {config.train.metric_for_best_model}"
        problems.append(
            f"{asked} cannot be used with --method full and {best}: each process holds a part of "
            f"the trained weights, and only the last model is kept. Drop {best}, or use --shard "
            "none."
        )
    if config.speed.verify:
        problems.append(
            f"{asked} cannot compare the fast step of --method full with the plain one, whose "
            "gradients no process has whole. Drop --verify-fast, or use --shard none."
        )
    if config.train.on_nonfinite == "rollback":
        problems.append(
            f"{asked} cannot be used with --method full and --on-nonfinite rollback. Use skip."
        )
    return problems
