"""Tasks: one module per type of target.

Tasks can be imported without torch; functions that compute import it themselves. `config.tasks`
maps task names to modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ftlevel.tasks.base import BaseTask, load_tasks


class _Tasks(Mapping[str, BaseTask]):
    """Name → task; the modules are imported on first access, so that they can import this one."""

    def __getitem__(self, name: str) -> BaseTask:
        return load_tasks()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(load_tasks())

    def __len__(self) -> int:
        return len(load_tasks())


TASKS: Mapping[str, BaseTask] = _Tasks()

__all__ = ["TASKS", "BaseTask"]
