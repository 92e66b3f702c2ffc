"""Tasks: one module per kind of target.

Tasks can be imported without torch; functions that compute import it themselves. `config.tasks`
maps task names to modules.
"""

from __future__ import annotations

from ftlevel.config import TASKS as NAMES
from ftlevel.tasks.base import BaseTask, find_task

TASKS: dict[str, BaseTask] = {name: find_task(name) for name in NAMES}

__all__ = ["TASKS", "BaseTask"]
