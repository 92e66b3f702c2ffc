"""One file a kind of target, and in it everything that the rest asks of its tasks.

May import fast and what is below it. What a task is can be read without torch: whatever computes
imports it where it is used. `config.tasks` names the file of each task.
"""

from __future__ import annotations

from ftlevel.config import TASKS as NAMES
from ftlevel.tasks.base import BaseTask, find_task

TASKS: dict[str, BaseTask] = {name: find_task(name) for name in NAMES}

__all__ = ["TASKS", "BaseTask"]
