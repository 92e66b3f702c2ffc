"""Tasks: one module per type of target.

Tasks can be imported without torch; functions that compute import it themselves. `config.tasks`
maps task names to modules.
"""

from __future__ import annotations

from ftlevel.tasks.base import BaseTask, load_tasks

TASKS: dict[str, BaseTask] = load_tasks()

__all__ = ["TASKS", "BaseTask"]
