"""Where a task is found by its name: in the module that `config.tasks` names for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ftlevel.config.tasks import TASKS

if TYPE_CHECKING:
    from ftlevel.tasks.base import BaseTask


def find_task(name: str) -> BaseTask:
    """Return the task called `name`: the one of that name among its module's `TASKS`."""
    tasks: tuple[BaseTask, ...] = importlib.import_module(TASKS[name]).TASKS
    return next(task for task in tasks if task.name == name)
