"""Preference training and reward models: configuration, tasks, losses and reference models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftlevel.extensions import Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag

_ALIASES = {
    "preference": ("preferences", "dpo", "rlhf"),
    "reward": ("reward-model", "reward-modeling"),
}
_WEIGHTS = ("simpo_gamma", "sft_weight", "desirable_weight", "undesirable_weight")


def _flags() -> list[Flag]:
    from ftlevel.config.flag import HOW, Flag

    return [
        Flag("preference.loss", "", HOW),
        Flag("preference.beta", "", HOW),
        Flag("preference.reference", "", HOW, metavar="start|none|RUN"),
        *[Flag(f"preference.{name}", "", HOW) for name in _WEIGHTS],
    ]


EXTENSION = Extension(
    tasks=dict.fromkeys(("preference", "reward"), "ftlevel.extras.preference.task"),
    task_aliases={alias: (task, {}) for task, names in _ALIASES.items() for alias in names},
    sections={"preference": "ftlevel.extras.preference.config:PreferenceConfig"},
    data_checks=("ftlevel.extras.preference.config:PreferenceChecks",),
    flags=_flags,
)
