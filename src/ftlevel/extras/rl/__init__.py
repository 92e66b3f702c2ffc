"""Reinforcement learning from checkable rewards: configuration, task, sampling, step and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ftlevel.extensions import Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag, FlagAliases


def _flags() -> list[Flag]:
    from ftlevel.config.flag import HOW, INFERENCE, Flag

    rows = ("train", "preview")
    return [
        Flag("rl.reward", "", HOW, rows, is_repeatable=True, metavar="NAME[=W]"),
        Flag("rl.loss", "", HOW),
        Flag("rl.beta", "", HOW),
        Flag("rl.num_generations", "", HOW, rows),
        Flag("rl.max_completion_length", "", HOW, rows),
        Flag("rl.stop", "", HOW, rows, is_repeatable=True, metavar="TEXT"),
        Flag("rl.epsilon", "", HOW),
        Flag("rl.epsilon_high", "", HOW),
        Flag("rl.num_iterations", "", HOW),
        Flag("rl.scale_rewards", "", HOW),
        Flag("rl.importance_sampling_level", "", HOW),
        Flag("rl.use_bias_correction_kl", "--use-bias-correction-kl/--no-bias-correction-kl", HOW),
        Flag(
            "rl.mask_truncated_completions", "--mask-truncated-completions/--no-mask-truncated", HOW
        ),
        Flag("rl.dynamic_sampling", "", HOW, metavar="N"),
        Flag("rl.rollouts", "", HOW, metavar="URL"),
        Flag("rl.check_groups", "", HOW, rows, metavar="N"),
        Flag("rl.reward_timeout", "", HOW, rows, metavar="SECONDS"),
        Flag("rl.on_reward_error", "", HOW, rows),
        Flag("reward", "", INFERENCE, ("evaluate",), is_repeatable=True, metavar="NAME[=W]"),
    ]


def _aliases() -> Mapping[str, FlagAliases]:
    from ftlevel.config.flag import FlagAliases
    from ftlevel.extras.rl.other_tools import ALIASES

    return ALIASES | {
        "train.max_new_tokens": FlagAliases(by_task={"rl": "rl.max_completion_length"}),
        "train.temperature": FlagAliases(by_task={"rl": "rl.temperature"}),
        "train.top_p": FlagAliases(by_task={"rl": "rl.top_p"}),
    }


EXTENSION = Extension(
    tasks={"rl": "ftlevel.extras.rl.task"},
    task_aliases={loss: ("rl", {"rl": {"loss": loss}}) for loss in ("grpo", "rloo")},
    sections={"rl": "ftlevel.extras.rl.config:RlConfig"},
    evaluate_options=("ftlevel.extras.rl.config:RewardOptions",),
    flags=_flags,
    aliases=_aliases,
    hooks={
        "complete_flags": "ftlevel.extras.rl.other_tools:complete_flags",
        "convert_keys": "ftlevel.extras.rl.other_tools:convert_keys",
        "summarize_samples": "ftlevel.extras.rl.rollout_file:summarize_rollouts",
    },
)
